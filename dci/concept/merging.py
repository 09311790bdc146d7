"""Closed-form merging of separately trained concepts (Kumari et al. 2023, Sec. 3.3).

Of all weights W that give every concept's words the keys and values that its own fine-tuning gives
them, the one that changes the keys and values of ordinary captions least:

    min_W |W C_reg^T - W_0 C_reg^T|   so that   W C^T = V.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, combinations

import torch
from torch import Tensor

from dci.concept.concept_file import Concept, LowRank, check_bare
from dci.concept.low_rank import product_factors
from dci.concept.modifier_tokens import ConceptName, is_learned, modifier_names
from ldm import tokenizer
from ldm.checkpoint import fingerprint
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.tokenizer import VOCAB_SIZE

PROMPT = "photo of a {}"


@dataclass(frozen=True)
class Merged:
    """Several concepts in one, and how well it went."""

    concept: Concept
    kept: float  # largest |W C^T - V| / |V| of all weights: how far target words are from their own keys and values
    changed: float  # |W C_reg^T - W_0 C_reg^T| / |W_0 C_reg^T| over all weights: what it costs ordinary captions


def constrained_solution(targets: Tensor, captions: Tensor) -> Tensor:
    """The linear map from what the targets' outputs lack to the least change of a weight.

    With R (n, outputs) = V - C W_0^T the solution is W = W_0 + (P R)^T. P is found by orthogonal
    decompositions, not by inverting C_reg^T C_reg, which would square its condition number.

    Args:
        targets: C (n, d) float64, one row for each target word.
        captions: C_reg (m, d) float64, one row for each token of the captions.

    Returns:
        P (d, n).
    """
    # C X = R fixes the part of X in the rows' span; the rest is free, and makes |C_reg X| least.
    u, s, v = torch.linalg.svd(targets, full_matrices=True)
    rank = int((s > s[0] * 1e-12).sum())
    span, free = v[:rank].T, v[rank:].T
    a = torch.linalg.qr(captions).R  # |C_reg X| = |a X|
    free_part = torch.linalg.lstsq(a @ free, a @ span, driver="gelsd").solution
    return (span - free @ free_part) @ (u[:, :rank] / s[:rank]).T


@torch.no_grad()
def merge(
    concepts: list[Concept],
    model: LatentDiffusion,
    captions: list[str],
    prompt: str = PROMPT,
    report: Callable[[str], None] = lambda _: None,
) -> Merged:
    """Merge concepts of one base model. Exact: float64, stored as a change of low rank in fp32.

    Args:
        model: the base model, without any concept.
        captions: whose keys and values should change least.
        prompt: the target words are those of each concept in this prompt; {} is the concept.

    Raises:
        UserError: fewer than two concepts, of other base models, or with more trained than keys and values.
    """
    _check(concepts, model, prompt, captions)
    text, base = model.text_encoder, model.state_dict()
    targets = [_target_rows(model, concept, prompt) for concept in concepts]
    rows = [text.encode(text.embed(text.tokenize([caption])))[0] for caption in captions]
    c, c_reg = torch.cat(targets).double().cpu(), torch.cat(rows).double().cpu()
    solution = constrained_solution(c, c_reg)
    report(f"{len(c)} target words, {len(c_reg)} tokens of {len(captions)} captions")

    own = [concept.weights(model) for concept in concepts]
    names = [n for n in base if n.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")) and any(n in w for w in own)]
    low_rank, kept, changed, before = {}, 0.0, 0.0, 0.0
    for name in names:
        w_0 = base[name].double().cpu()
        values = torch.cat([t.double().cpu() @ w.get(name, w_0).double().T for t, w in zip(targets, own, strict=True)])
        change = product_factors((values - c @ w_0.T).T, solution.T)
        low_rank[name] = LowRank(*(factor.float() for factor in change))
        stored = w_0 + low_rank[name].u.double() @ low_rank[name].v.double()
        kept = max(kept, ((c @ stored.T - values).norm() / values.norm()).item())
        changed += (c_reg @ (stored - w_0).T).square().sum().item()
        before += (c_reg @ w_0.T).square().sum().item()
    return Merged(_joined(concepts, low_rank), kept, (changed / before) ** 0.5 if names else 0.0)


def _target_rows(model: LatentDiffusion, concept: Concept, prompt: str) -> Tensor:
    """Text contexts of the concept's modifier tokens and noun in the prompt (n, d), of all concepts in the file."""
    text = model.text_encoder
    ends = list(accumulate(len(name.modifier_tokens) for name in concept.names))
    before, behind = (tokenizer.tokenize(part) for part in prompt.split("{}"))
    rows = []
    for start, end, name in zip([0, *ends], ends, concept.names, strict=False):
        named = [*range(VOCAB_SIZE + start, VOCAB_SIZE + end), *tokenizer.tokenize(name.class_noun)]
        ids = torch.tensor([tokenizer.frame([*before, *named, *behind])], device=model.device)
        context = text.encode(text.embed(ids, concept.modifiers.to(model.device)))[0]
        rows.append(context[1 + len(before) : 1 + len(before) + len(named)])
    return torch.cat(rows)


def _joined(concepts: list[Concept], low_rank: dict[str, LowRank]) -> Concept:
    """One concept file's content: all tokens under new names, in the order of the concepts."""
    old = [name for concept in concepts for name in concept.names]
    tokens = modifier_names([len(name.modifier_tokens) for name in old])
    first = concepts[0]
    none = first.prefixes.new_empty(0, 0, first.modifiers.shape[1])
    return dataclasses.replace(
        first,
        keys_values={},
        low_rank=low_rank,
        modifiers=torch.cat([concept.modifiers for concept in concepts]),
        prefixes=none,  # contexts belong to the images of one concept; its own file has them
        suffixes=none,
        names=tuple(ConceptName(new, name.class_noun) for new, name in zip(tokens, old, strict=True)),
    )


def _check(concepts: list[Concept], model: LatentDiffusion, prompt: str, captions: list[str]) -> None:
    if len(concepts) < 2:
        raise UserError("one concept is nothing to merge: give two or more")
    if prompt.count("{}") != 1:
        raise UserError(f"the prompt '{prompt}' must hold {{}} once, where the concept is")
    if not captions:
        raise UserError("no captions: give a file with one caption in each line")
    check_bare(model)
    found = fingerprint(model)
    for concept in concepts:
        if concept.base != found:
            raise UserError(
                f"a concept was learned on the base model '{concept.base_name}' ({concept.base}), "
                f"but '{model.config.name}' ({found}) is loaded: merge concepts of one base"
            )
        concept.check_fits(model)
        trigger = next((token for name in concept.names for token in name.modifier_tokens if not is_learned(token)), None)
        if trigger:
            raise UserError(f"a concept is named by the word '{trigger}' in place of learned tokens: it cannot be merged")
        other = [n for n in concept.changed if not n.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
        if other:
            raise UserError(
                f"a concept has {other[0]} trained too: only keys and values (training.trainable=crossattn-kv) can be merged"
            )
    for first, second in combinations(concepts, 2):
        if first.names == second.names and len(first.modifiers) and torch.equal(first.modifiers, second.modifiers):
            raise UserError(f"two of the concepts to merge are the same, '{first.describe()}': give each once")

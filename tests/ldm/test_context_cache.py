"""The same prompt is tokenized and encoded once, and anew where anything about it is another."""

import copy
import dataclasses

import pytest
import torch
from helpers import run_main

from dci.concept.modifier_tokens import ConceptName
from dci.concept.prompts import parse_prompt
from dci.dual_branch.sampling import BranchContexts
from ldm import tokenizer
from ldm.clip_text import CLIPTextTransformer
from ldm.context_cache import ContextCache, version


@pytest.fixture
def encoded(monkeypatch):
    """The rows that CLIP's text transformer is given, one number for each call."""
    rows, plain = [], CLIPTextTransformer.forward

    def forward(self, embeddings, depth):
        rows.append(len(embeddings))
        return plain(self, embeddings, depth)

    monkeypatch.setattr(CLIPTextTransformer, "forward", forward)
    return rows


def branches(model, concept, text="a V* cat on the beach", negative="", images=2):
    prompt = parse_prompt(text, ConceptName(concept.modifier_tokens, "cat"))
    return BranchContexts.of(model, concept, [prompt] * images, negative)


@pytest.mark.slow
def test_prompts_of_a_file_are_encoded_once_in_a_run(tmp_path, encoded, monkeypatch):
    tokenizer._ids.cache_clear()
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n a dog \n")
    run_main(
        "txt2img.py",
        "--from-file",
        tmp_path / "prompts.txt",
        "--seeds",
        "0-3",
        "--n-samples",
        1,
        "--steps",
        1,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--outdir",
        tmp_path / "out",
    )
    assert len(list((tmp_path / "out/samples").glob("*.png"))) == 12
    assert encoded == [1, 1, 1]  # "", "a dog", "a cat"
    assert tokenizer._ids.cache_info().misses == 3


def test_branches_are_encoded_once(finetuned, encoded):
    model, concept = copy.deepcopy(finetuned[0]), finetuned[1]
    first = branches(model, concept)
    assert encoded == [1, 1, 1]  # nothing, the concept's prompt, the auxiliary one
    again = branches(model, concept, images=3)
    assert len(encoded) == 3
    for name in ("unconditional", "concept", "auxiliary"):
        assert torch.equal(getattr(again, name)[2], getattr(first, name)[0])
    text = model.text_encoder
    fresh = text.encode(text.embed(text.tokenize(["", "a cat on the beach"])))
    torch.testing.assert_close(first.unconditional[0], fresh[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.auxiliary[1], fresh[1], rtol=1e-5, atol=1e-5)


def test_another_concept_has_its_own_context_and_shares_the_rest(finetuned, encoded):
    model, concept = copy.deepcopy(finetuned[0]), finetuned[1]
    first = branches(model, concept)
    other = dataclasses.replace(concept, modifiers=concept.modifiers.flip(1))
    second = branches(model, other)
    assert len(encoded) == 4
    assert torch.equal(second.auxiliary, first.auxiliary)
    assert (second.concept - first.concept).abs().max() > 1e-3
    model.text_encoder.remembered.forget()
    torch.testing.assert_close(branches(model, other).concept, second.concept)


@torch.no_grad()
def test_other_weights_are_seen(tiny, encoded):
    text = tiny.text_encoder
    rows = text.tokenize(["a dog", ""]).tolist()
    first = text.contexts(rows)
    text.token_table[tokenizer.tokenize("dog")] += 1  # in place
    second = text.contexts(rows)
    assert len(encoded) == 4
    assert not torch.equal(first[0], second[0])
    state = {name: tensor.clone() for name, tensor in text.state_dict().items()}
    text.load_state_dict(state, assign=True)  # equal weights, but other tensors
    torch.testing.assert_close(text.contexts(rows), second)
    assert len(encoded) == 6
    text.bfloat16()
    assert text.contexts(rows).dtype == torch.bfloat16
    with torch.inference_mode():
        written = copy.deepcopy(tiny.text_encoder)
    assert version(written) is None  # whose changes cannot be told: not remembered
    written.contexts(rows)
    written.contexts(rows)
    assert len(encoded) == 12


def test_the_cache_is_bounded_and_keeps_what_was_used_last():
    cache, asked = ContextCache(size=2), []

    def get(of, *keys):
        return cache.get(of, keys, lambda key: asked.append(key) or key * 10)

    assert get("w", 1, 2, 1) == [10, 20, 10]
    assert get("w", 1) == [10]
    assert get("w", 3, 4, 1) == [30, 40, 10]  # more than it holds, in one call
    assert asked == [1, 2, 3, 4]
    assert len(cache.contexts) == 2
    get("w", 1)
    get("other", 1)
    assert asked == [1, 2, 3, 4, 1]
    get(None, 1)
    get(None, 1)
    assert asked == [1, 2, 3, 4, 1, 1, 1]

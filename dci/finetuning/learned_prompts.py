"""ICO's learned embeddings (Sec. 3.2): modifier tokens, and a context for each reference image.

A training prompt is a row of token ids in which ids beyond CLIP's vocabulary stand for learned
embeddings. They take their places before positions are added, so every embedding gets the position
where it really stands.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from dci.finetuning.config import ContextConfig
from ldm import tokenizer
from ldm.errors import UserError
from ldm.text_encoder import TextEncoder
from ldm.tokenizer import VOCAB_SIZE


class LearnedTokens(nn.Module):
    """[prefix of image i] [modifier tokens] [class noun] [suffix of image i].

    Each image's context is a parameter of its own, so that a step without the image leaves it,
    its momentum and its decay alone. With a template the words around the concept are fixed.
    """

    def __init__(
        self,
        modifiers: Tensor,  # first embeddings of all modifier tokens (k, d)
        prefixes: Tensor,  # (contexts, p, d)
        suffixes: Tensor,  # (contexts, s, d)
        class_nouns: str | list[str],  # of each concept
        tokens: list[int] | None = None,  # modifier tokens of each concept; None: all belong to the one
        concept_of: list[int] | None = None,  # the concept of each image; None: the only one
        context_of: list[int] | None = None,  # the context of each image; None: each its own
        template: str | None = None,  # such as "photo of a {}"
    ):
        super().__init__()
        class_nouns = [class_nouns] if isinstance(class_nouns, str) else class_nouns
        self.modifiers = nn.Parameter(modifiers.clone())
        self.prefixes, self.suffixes = (
            # A context of no tokens is no weight to train.
            nn.ParameterList(nn.Parameter(row.clone(), requires_grad=row.numel() > 0) for row in rows)
            for rows in (prefixes, suffixes)
        )
        self.concept_of, self.context_of = concept_of, context_of
        ends = list(accumulate(tokens or [len(modifiers)]))
        self.concept_ids = [
            [*range(VOCAB_SIZE + start, VOCAB_SIZE + end), *tokenizer.tokenize(noun)]
            for start, end, noun in zip([0, *ends], ends, class_nouns, strict=False)
        ]
        self.template = None if template is None else [tokenizer.tokenize(text) for text in template.split("{}")]
        around = sum(map(len, self.template)) if self.template else prefixes.shape[1] + suffixes.shape[1]
        used = around + max(map(len, self.concept_ids)) + 2
        if used > tokenizer.MAX_LENGTH:
            raise UserError(
                f"contexts, modifier tokens and class noun take {used} of {tokenizer.MAX_LENGTH} positions: "
                "shorten the contexts"
            )

    def context_parameters(self) -> list[nn.Parameter]:
        """The learned contexts of all images."""
        return [row for row in (*self.prefixes, *self.suffixes) if row.requires_grad]

    def training_prompts(self, images: list[int], caption_prefixes: list[str] | None = None) -> tuple[Tensor, Tensor]:
        """Return the prompts of reference images as token ids and the embeddings they refer to.

        Args:
            images: the batch's reference images; one may come several times.
            caption_prefixes: for the front of each prompt, such as "far away".

        Returns:
            (ids (b, 77), extra embeddings (n, d) for `TextEncoder.embed`).
        """
        extra: list[Tensor] = [self.modifiers]
        around: dict[int, tuple[list[int], list[int]]] = {}
        place = VOCAB_SIZE + len(self.modifiers)
        rows = []
        for image, front in zip(images, caption_prefixes or [""] * len(images), strict=True):
            context = image if self.context_of is None else self.context_of[image]
            if self.template is None and context not in around:
                prefix, suffix = self.prefixes[context], self.suffixes[context]
                middle, end = place + len(prefix), place + len(prefix) + len(suffix)
                around[context] = (list(range(place, middle)), list(range(middle, end)))
                extra += [prefix, suffix]
                place = end
            before, behind = self.template or around[context]
            concept = self.concept_ids[0 if self.concept_of is None else self.concept_of[image]]
            rows.append(tokenizer.frame([*tokenizer.tokenize(front), *before, *concept, *behind]))
        ids = torch.tensor(rows, dtype=torch.long, device=self.modifiers.device)
        return ids.view(-1, tokenizer.MAX_LENGTH), torch.cat(extra)


def initial_contexts(
    config: ContextConfig, contexts: int, text_encoder: TextEncoder, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the first prefixes (contexts, p, d) and suffixes (contexts, s, d).

    They start from the embeddings of the configured texts, or from N(0, 0.02) where there is none.
    With a template there is nothing to learn, and both are empty.
    """
    tables = text_encoder.token_tables
    width = sum(table.shape[1] for table in tables)

    def initial(text: str | None, length: int) -> Tensor:
        if config.template is not None:
            return tables[0].new_empty(0, 0, width, dtype=torch.float32)
        if text is None:
            return 0.02 * torch.randn(contexts, length, width, generator=generator)
        rows = torch.cat([table[tokenizer.tokenize(text)] for table in tables], dim=1)
        return rows.detach().float().expand(contexts, -1, -1)

    return initial(config.prefix, config.prefix_length), initial(config.suffix, config.suffix_length)

"""ICO's learned embeddings (Sec. 3.2): modifier tokens, and a context for each reference picture.

A training prompt is a row of token ids in which ids beyond CLIP's vocabulary stand for learned
embeddings. They take their places before positions are added, so every embedding gets the position
where it really stands.
"""

import torch
from torch import Tensor, nn

from dci.config import ContextConfig
from ldm import tokenizer
from ldm.errors import UserError
from ldm.text_encoder import CLIPTextEncoder
from ldm.tokenizer import VOCAB_SIZE


class LearnedTokens(nn.Module):
    """[prefix of picture i] [modifier tokens] [class noun] [suffix of picture i].

    Each picture's context is a parameter of its own, so that a step without the picture leaves it,
    its momentum and its decay alone.
    """

    def __init__(
        self,
        modifiers: Tensor,  # first embeddings of the modifier tokens (k, d)
        prefixes: Tensor,  # (pictures, p, d)
        suffixes: Tensor,  # (pictures, s, d)
        class_noun: str,
    ):
        super().__init__()
        self.modifiers = nn.Parameter(modifiers.clone())
        self.prefixes = nn.ParameterList(nn.Parameter(row.clone()) for row in prefixes)
        self.suffixes = nn.ParameterList(nn.Parameter(row.clone()) for row in suffixes)
        self.noun_ids = tokenizer.tokenize(class_noun)
        used = len(modifiers) + prefixes.shape[1] + suffixes.shape[1] + len(self.noun_ids) + 2
        if used > tokenizer.MAX_LENGTH:
            raise UserError(
                f"contexts, modifier tokens and class noun take {used} of {tokenizer.MAX_LENGTH} positions: "
                "shorten the contexts"
            )

    def context_parameters(self) -> list[nn.Parameter]:
        """The image-specific contexts of all pictures."""
        return [*self.prefixes, *self.suffixes]

    def training_prompts(self, pictures: list[int]) -> tuple[Tensor, Tensor]:
        """Return the prompts of reference pictures as token ids and the embeddings they refer to.

        Args:
            pictures: the batch's reference pictures; one may come several times.

        Returns:
            (ids (b, 77), extra embeddings (n, d) for `CLIPTextEncoder.embed`).
        """
        extra, rows, place = [self.modifiers], {}, VOCAB_SIZE + len(self.modifiers)
        modifier_ids = list(range(VOCAB_SIZE, place))
        for picture in pictures:
            if picture in rows:
                continue
            prefix, suffix = self.prefixes[picture], self.suffixes[picture]
            prefix_ids = list(range(place, place + len(prefix)))
            suffix_ids = list(range(place + len(prefix), place + len(prefix) + len(suffix)))
            rows[picture] = tokenizer.frame(prefix_ids + modifier_ids + self.noun_ids + suffix_ids)
            extra += [prefix, suffix]
            place += len(prefix) + len(suffix)
        ids = torch.tensor([rows[picture] for picture in pictures], dtype=torch.long, device=self.modifiers.device)
        return ids.view(-1, tokenizer.MAX_LENGTH), torch.cat(extra)


def initial_contexts(
    config: ContextConfig, pictures: int, text_encoder: CLIPTextEncoder, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the first prefixes (pictures, p, d) and suffixes (pictures, s, d).

    They start from the embeddings of the configured texts, or from N(0, 0.02) where there is none.
    """
    table = text_encoder.token_table.detach().float()

    def initial(text: str | None, length: int) -> Tensor:
        if text is None:
            return 0.02 * torch.randn(pictures, length, table.shape[1], generator=generator)
        return table[tokenizer.tokenize(text)].expand(pictures, -1, -1)

    return initial(config.prefix, config.prefix_length), initial(config.suffix, config.suffix_length)

"""The UNet's condition on a text: a context for its cross-attention and, in some families, one vector besides.

One seam for all families: text goes into a text encoder, a `Conditioning` comes out. Sampling and
training hand it on and need not know whether there is a vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.attention import Text, stacked


class Conditioning(NamedTuple):
    """A batch of texts as the UNet reads them."""

    context: Text  # (b, l, d), or each layer's keys and values
    vector: Tensor | None = None  # (b, v); None in families that have none

    @property
    def tensor(self) -> Tensor:
        """The context as it came from the text encoder (b, l, d).

        Raises:
            TypeError: there are keys and values in its place.
        """
        if not isinstance(self.context, Tensor):
            raise TypeError("keys and values were worked out of the context: keep it before")
        return self.context

    def chunk(self, parts: int) -> list["Conditioning"]:
        """Split the rows of a context into equal parts."""
        vectors = [None] * parts if self.vector is None else self.vector.chunk(parts)
        return [Conditioning(*rows) for rows in zip(self.tensor.chunk(parts), vectors, strict=True)]

    def to(self, *args, **kwargs) -> "Conditioning":
        """Move or cast; keys and values stay as they are."""
        context = self.context.to(*args, **kwargs) if isinstance(self.context, Tensor) else self.context
        return Conditioning(context, None if self.vector is None else self.vector.to(*args, **kwargs))

    def rows(self, order: Tensor) -> "Conditioning":
        """Take rows of a context, in the given order (n,)."""
        return Conditioning(self.tensor[order], None if self.vector is None else self.vector[order])


def conditioning(text: Text | Conditioning) -> Conditioning:
    """Return a context by itself as a conditioning without a vector; a conditioning stays one."""
    return text if isinstance(text, Conditioning) else Conditioning(text)


def concatenated(parts: Sequence[Conditioning]) -> Conditioning:
    """Put the rows of several conditionings below each other; all have tensors, or all keys and values."""
    tensors = [part.context for part in parts if isinstance(part.context, Tensor)]
    read = [part.context for part in parts if isinstance(part.context, list)]
    vectors = [part.vector for part in parts if part.vector is not None]
    return Conditioning(torch.cat(tensors) if tensors else stacked(read), torch.cat(vectors) if vectors else None)


class ImageSize(NamedTuple):
    """The image sizes that SDXL is conditioned on, in pixels (Podell et al. 2023, Sec. 2.2)."""

    original: tuple[int, int]  # height and width of the image that it was
    crop: tuple[int, int]  # top and left of what was cut out of it
    target: tuple[int, int]  # height and width of what is made

    def row(self) -> Tensor:
        """The six numbers, in the order of the conditioning vector: (1, 6)."""
        return torch.tensor([[*self.original, *self.crop, *self.target]], dtype=torch.float32)

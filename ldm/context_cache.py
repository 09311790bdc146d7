"""A cache of text contexts: a run has many images, and few prompts."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import nn

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

Version = tuple[tuple[int, int], ...]


def version(module: nn.Module) -> Version | None:
    """Return a value that changes whenever a module's weights are replaced, moved or written to; None: it cannot be known.

    Writing through `.data` leaves no trace.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return None  # such tensors count no changes
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


class ContextCache:
    """The latest contexts of a text encoder, as long as its weights stay as they are."""

    def __init__(self, size: int = 256):
        self.size = size
        self.version: Version | None = None  # of the weights that the contexts are of
        self.contexts: OrderedDict[Hashable, Any] = OrderedDict()  # the latest used is the last

    def get(self, of: Version | None, keys: Sequence[K], encode: Callable[[K], V]) -> list[V]:
        """Return the context of each key, those that are new from `encode`.

        Args:
            of: the weights' version; contexts of another are forgotten.
        """
        if of is None or of != self.version:
            self.forget()
            self.version = of
        found: dict[K, V] = {}
        for key in keys:
            if key not in found:
                known = self.contexts.pop(key, None)
                found[key] = encode(key) if known is None else known
        for key, context in found.items():
            self.contexts[key] = context
        while len(self.contexts) > self.size:
            self.contexts.popitem(last=False)
        return [found[key] for key in keys]

    def forget(self) -> None:
        """Empty the cache."""
        self.contexts.clear()

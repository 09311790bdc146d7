"""Stand-ins that replace a pipeline's components for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StandIn:
    """Imitates an object, its class included, except for the attributes that it is given.

    Args:
        stands_for: the object.
        own: attributes in place of the object's; `call` for being called.
    """

    def __init__(self, stands_for: Any, **own: Any):
        self._stands_for, self._own = stands_for, own

    @property
    def __class__(self) -> type:
        return type(self._stands_for)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._own["call"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._own[name] if name in self._own else getattr(self._stands_for, name)


@contextmanager
def standing_in(pipe: Any, **components: StandIn) -> Iterator[None]:
    """Within it stand-ins replace a pipeline's components; afterwards the components are back.

    They go beside the pipeline's own bookkeeping, whose configuration would otherwise name them.
    """
    before = {name: pipe.__dict__[name] for name in components}
    pipe.__dict__.update(components)
    try:
        yield
    finally:
        pipe.__dict__.update(before)

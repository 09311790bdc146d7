"""Types of options: what Python users and configurations give, held against a dataclass's annotations."""

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from ldm.errors import UserError
from ldm.texts import did_you_mean

LARGEST = 3.4e38  # of single precision, in which the arithmetic is done


def checked(schema: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a dataclass in its own types; numbers of NumPy become Python's.

    Raises:
        UserError: an option of another type, or a number that is not finite in single precision.
    """
    hints = get_type_hints(schema)
    return {name: _checked(name, value, hints[name]) for name, value in given.items()}


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for an option that there is not; the nearest one is named."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise UserError(f"unknown option '{name}'{did_you_mean(name, known)}")


def names_of(*schemas: type) -> set[str]:
    """Return the options that dataclasses have."""
    return {field.name for schema in schemas for field in dataclasses.fields(schema)}


def _checked(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = get_args(hint)
        if value is None and type(None) in kinds:
            return None
        hint = next(kind for kind in kinds if kind is not type(None))
    if hint is bool:
        if not isinstance(value, bool):
            raise UserError(f"{name} {value!r}: expected true or false")
    elif hint is int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UserError(f"{name} {value!r}: expected a whole number")
        return int(value)
    elif hint is float:
        size: Any = abs(value) if isinstance(value, Real) and not isinstance(value, bool) else math.inf
        if not size <= LARGEST:  # no number too
            raise UserError(f"{name} {value!r}: expected a finite number")
        return value if isinstance(value, int) else float(value)
    elif hint is str and not isinstance(value, str):
        raise UserError(f"{name} {value!r}: expected text")
    return value

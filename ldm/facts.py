"""Dataclasses stored as JSON: read back strictly, or refused in one line that says what is wrong."""

import functools
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, cast

from ldm.errors import UserError

T = TypeVar("T")


def read_fact(schema: type[T], content: Any, source: str = "") -> T:
    """Fill a dataclass from an object of JSON, whose null is no number (NaN) where one is expected.

    Keys of the object that are no fields are left out, for a newer version may know more; those of its parts are refused.

    Args:
        source: what holds the object, for messages; "": they begin with the field.

    Raises:
        UserError: it is no object, a field without a default is missing, or one is of another type.
    """
    before = f"{source}: " if source else ""
    kinds, given = _kinds(cast(Any, schema)), {}
    if not isinstance(content, dict):
        raise UserError(f"{before}expected an object with {', '.join(kinds)}")
    for field in fields(cast(Any, schema)):
        if field.name in content:
            given[field.name] = _read(kinds[field.name], content[field.name], f"{before}{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{before}{field.name} is missing")
    return schema(**given)


@functools.cache
def _kinds(schema: Any) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _read(kind: Any, value: Any, name: str) -> Any:
    """A value as a type has it: a dataclass, a list or a tuple of any length, a dict, a plain value, any of them or None."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _read(inner[0], value, name)
    if is_dataclass(kind):
        if isinstance(value, dict) and (unknown := value.keys() - _kinds(cast(Any, kind)).keys()):
            raise UserError(f"{name}: unknown key '{min(unknown)}'")
        return read_fact(cast(type, kind), value, name)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_read(inner[0], entry, f"{name}[{i}]") for i, entry in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read(inner[1], entry, f"{name}.{key}") for key, entry in value.items()}
    if kind is float and value is None:
        return float("nan")
    plain: Any = {Any: object, float: (int, float)}.get(kind, origin or kind)
    if not isinstance(value, plain) or (isinstance(value, bool) and kind in (int, float)):
        raise UserError(f"{name}: expected {_NAMES.get(origin or kind, kind)}, not {value!r:.60}")
    return value


_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}

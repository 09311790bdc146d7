"""How the page's events are connected."""

from typing import Any


def private(**options: Any) -> dict[str, Any]:
    """Options of an event that is the page's own: no documented endpoint, and no spinner over what is there."""
    return {"api_visibility": "private", "show_progress": "hidden", **options}


def at_once(**options: Any) -> dict[str, Any]:
    """Options of an event that takes milliseconds and so does not wait in the queue."""
    return private(queue=False, **options)

"""Presses of the page's buttons, and which of them have been cancelled since."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable


class Running:
    """Records which presses a client has cancelled: presses and cancellations share one rising count.

    Gradio's own way ends whatever the same client has running by the time that it gets there, the next press included.
    """

    def __init__(self, most: int = 256):
        self._most, self._numbers, self._lock = most, itertools.count(1), threading.Lock()
        self._given_up = OrderedDict[str, int]()

    def press(self) -> int:
        """Return the number of a press."""
        return next(self._numbers)

    def stop(self, client: str) -> None:
        """Note that a client cancels what it has pressed so far."""
        with self._lock:
            self._given_up[client] = next(self._numbers)
            self._given_up.move_to_end(client)
            while len(self._given_up) > self._most:
                self._given_up.popitem(last=False)

    def given_up(self, client: str | None, press: float | None) -> Callable[[], bool]:
        """Return a function that checks whether a client has cancelled since a press."""
        return lambda: press is not None and press < self._given_up.get(str(client), 0)

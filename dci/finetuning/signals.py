"""Signals that ask a run to stop: it finishes its step, writes a checkpoint and says how to go on."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Windows has no SIGUSR1."""


class Interrupted(Exception):
    """A run was asked to stop; the message says where it is and how to go on."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number  # of the signal

    @property
    def exit_code(self) -> int:
        """What a shell reports for a program that a signal ends."""
        return 128 + self.number


_Handler = Callable[[int, FrameType | None], Any] | int | None
"""What `signal.getsignal` knows."""


class GracefulStop:
    """Takes note of a signal while the context is open.

    Before training there is nothing to save, so a signal raises Interrupted at once; later the
    training loop asks for `number` after each step. A second signal does not wait for that.
    """

    def __init__(self):
        self.number = 0  # of the signal that came; 0: none
        self.training = False
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> "GracefulStop":
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Handle the signals, also where a library has set its own handlers in the meantime."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.training:
            raise Interrupted(f"Stopped by {name} before the first step: repeat the command to begin again", number)
        if self.number:
            raise Interrupted(f"Stopped by a second signal ({name}) within a step, without a checkpoint of it", number)
        self.number = number

"""Sampling as an iterator: the caller takes one step after another, and may stop between two of them."""

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

from ldm.sampling_loop import Callback


class _Stopped(BaseException):
    """Raised within sampling once its steps are no longer wanted; no handler of errors shall catch it."""


class Steps(Iterator[dict[str, Any]]):
    """The steps of `call(callback)`, which runs in a thread of its own, and only while a step is waited for.

    `close` ends it after the step that it is at; the thread is gone then.

    Args:
        call: samples, and calls its argument after each step with what `ldm.sampling_loop` says.
    """

    def __init__(self, call: Callable[[Callback], Any]):
        self.result: Any = None  # what `call` returned, once all steps are taken
        self._call = call
        self._error: BaseException | None = None
        self._step: dict[str, Any] | None = None
        self._go, self._ready = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __next__(self) -> dict[str, Any]:
        if self._closed:
            raise StopIteration
        self._go.release()
        self._ready.acquire()
        if self._step is None:
            self._closed = True
            self._thread.join()
            if self._error is not None:
                raise self._error
            raise StopIteration
        return self._step

    def close(self) -> None:
        """Stop sampling."""
        self._closed = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._go.acquire()
            if not self._closed:
                self.result = self._call(self._tell)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._step = None
        self._ready.release()

    def _tell(self, step: dict[str, Any]) -> None:
        self._step = step
        self._ready.release()
        self._go.acquire()
        if self._closed:
            raise _Stopped


def alternately(*strands: Steps) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Take the steps of several samplings in turn: (number of the strand, step); closing it closes all of them."""
    try:
        left = dict(enumerate(strands))
        while left:
            for number, strand in list(left.items()):
                step = next(strand, None)
                if step is None:
                    del left[number]
                else:
                    yield number, step
    finally:
        for strand in strands:
            strand.close()

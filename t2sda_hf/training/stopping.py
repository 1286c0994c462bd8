"""A signal: the step is finished, a checkpoint written, and the process ends with the usual exit code.

SIGTERM and SIGINT (Ctrl-C) ask for the end. SIGHUP comes when the terminal is closed, and SIGUSR1 is what Slurm sends
ahead of its own end. A signal that is ignored (`nohup`) stays ignored.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, TypeVar

import psutil

from ..errors import Stopped, heard

# Set in the processes that a launcher starts: by those of several, by accelerate's of one, by `launching`.
LAUNCHED = ("LOCAL_RANK", "ACCELERATE_DYNAMO_BACKEND", "T2SDA_COMMAND")
_HURRY = (signal.SIGTERM, signal.SIGINT)  # of these a second one means: at once
# The launcher hands on to its processes the Ctrl-C that the terminal has already sent them; that is not a second one.
_SAME = 0.5
Item = TypeVar("Item")


class StopRequest:
    """Inside its `with` block a first signal is only noted; a second one ends the process at once.

    A launcher that is gone counts as SIGTERM: nobody else is left who would pass on a signal.

    Attributes:
        number: of the signal that came, 0 before.
    """

    number = 0
    _since = 0.0
    _waiting = False
    _launcher: int | None = None

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in heard()}
        self._launcher = launcher()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if a signal came, or if the launcher is gone."""
        if not self.number and self._launcher is not None and os.getppid() != self._launcher:
            self.number = signal.SIGTERM
        if self.number:
            raise Stopped(self.number)

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; a signal ends the wait for one, however long it would be.

        Raises:
            Stopped: also for a signal that came before.
        """
        while True:
            self._waiting = True
            try:
                self.check()
                item = next(items)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), self.number
        if first in _HURRY and number in _HURRY:
            if now - self._since > _SAME:
                os._exit(128 + number)
            return
        if not first or number in _HURRY:
            self.number, self._since = number, now
            name = signal.Signals(number).name
            with suppress(OSError):  # the terminal may be gone
                # not print: a handler may interrupt one
                os.write(2, f"\n{name}: finishing the step and saving; once more to end at once.\n".encode())
        if self._waiting:
            raise Stopped(number)


def launcher() -> int | None:
    """The process that launched this one and passes signals on to it; None if nobody does."""
    if any(variable in os.environ for variable in (*LAUNCHED, "T2SDA_PARENT")):
        with suppress(psutil.Error):
            parent = psutil.Process(os.getppid())
            words = " ".join(parent.cmdline())
            if any(name in words for name in ("accelerate", "torchrun", "torch.distributed", "t2sda")):
                return parent.pid
    return None

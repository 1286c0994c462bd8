"""SIGTERM and SIGINT: the step is finished, a checkpoint written, and the process ends with the usual exit code."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from ..errors import Stopped

_HANDLED = (signal.SIGTERM, signal.SIGINT)
# The launcher hands on to its processes the Ctrl-C that the terminal has already sent them; that is not a second one.
_SAME = 0.5


class StopRequest:
    """Inside its `with` block a first signal is only noted; a second one ends the process at once.

    Attributes:
        number: of the signal that came, 0 before.
    """

    number = 0
    _since = 0.0

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in _HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.number:
            raise Stopped(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
            name = signal.Signals(number).name
            # not print: a handler may interrupt one
            os.write(2, f"\n{name}: finishing the step and saving; once more to end at once.\n".encode())
        elif now - self._since > _SAME:
            os._exit(128 + number)


def leave_signals_to_parent(worker: int) -> None:
    """For workers of a data loader: a signal to the whole process group must not take the data from the last step."""
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN)

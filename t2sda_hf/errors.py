"""How a command ends when something goes wrong: what the user did is a ValueError, the rest is one of these.

Only the standard library is imported here: the command line front knows them before any heavy library is loaded.
"""

import signal
from collections.abc import Iterator

# What asks a command to end, and what a parent passes on to its children: also a closed terminal, and Slurm's warning.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def heard() -> list[signal.Signals]:
    """Those of `SIGNALS` that this process does not ignore: `nohup` and a shell's `&` leave some of them out."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def leave_signals_to_parent(worker: int) -> None:
    """For workers of a data loader: a signal to the whole process group must not take the data from the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Ended(Exception):
    """A command ends here. `exit_code` is the one of the process; the text is for its user.

    In a run of several processes all of them end with the same error, and process 0 says it; `alone` marks one that
    only this process knows.
    """

    exit_code = 1
    alone = False


class Stopped(Ended):
    """A command ends because it was told to; `exit_code` is 128 + number of the signal."""

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(f"by {signal.Signals(number).name}{f'; {advice}' if advice else ''}.")
        self.exit_code = 128 + number


class CheckpointError(Ended, RuntimeError):
    """A checkpoint could not be written. The ones before it are untouched."""


class DamagedCheckpoint(Ended, ValueError):
    """A checkpoint is not what was written, or does not fit the run. Nothing was loaded."""

    exit_code = 2


class PushFailed(Ended):
    """The Hub did not take the files; the message says why and how to push again. The run folder is as it was."""

    exit_code = 2


class NotFinite(Ended, FloatingPointError):
    """Losses, gradients or weights are not finite; the text says which, and what to do."""


class DataFailed(Ended):
    """A process could not read the next batch; the text says which, and why. Every process ends with it."""


class RunFailed(Ended):
    """The machine failed the run: the disk, the network. The text says what remains."""

    alone = True


class OutOfMemory(Ended):
    """No memory is left, of the device or of the machine; the text says which keys to lower."""

    alone = True


class LostFolder(Ended):
    """The folder of a run is not the one that it made; nothing was written into it."""


class LostContact(Ended, RuntimeError):
    """Another process of the run is gone."""

    alone = True


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what led to it, one after the other, the first cause last."""
    one: BaseException | None = error
    told: list[BaseException] = []  # an error that was raised again may be its own cause
    while one is not None and one not in told:
        told.append(one)
        yield one
        one = one.__cause__ or one.__context__

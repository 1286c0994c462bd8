"""How many processes a command is: this one, those that accelerate starts, or one after the other."""

import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from .config import RECIPES, find_recipe
from .errors import Stopped

# Set by every launcher in the processes that it starts.
_LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
_FLAGS = ("num_processes", "accelerate_config", "machine_rank", "main_process_ip", "mixed_precision")


def launch(name: str, args: Namespace) -> int | None:
    """Start the processes that a command line asks for, and wait for them.

    One process is this one: nothing is started, and exit codes and signals are its own. Several are started as
    `accelerate launch` does, from the file that is named, or with one process per GPU.

    Args:
        name: of the command.
        args: with the flags of `cli._launching`, and the command's own words.

    Returns:
        The exit code, or None if this process is to do the work.

    Raises:
        ValueError: for flags that do not fit together, or that a launcher has to be given.
    """
    given = [flag for flag in _FLAGS if getattr(args, flag) is not None]
    if any(variable in os.environ for variable in _LAUNCHED):
        if given or args.cpu:
            flags = ", ".join(f"--{flag}" for flag in [*given, *(["cpu"] if args.cpu else [])])
            raise ValueError(f"this process was started by a launcher: give {flags} to that, not to t2sda {name}.")
        return None
    if args.num_processes is not None and args.num_processes < 1:
        raise ValueError(f"--num_processes must be at least 1, got {args.num_processes}.")
    if args.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    file = None
    if args.accelerate_config is not None:
        shipped = sorted(path.stem for path in (RECIPES / "accelerate").glob("*.yaml"))
        file = find_recipe(args.accelerate_config, "accelerate", shipped)
    if file is None and args.mixed_precision is not None:
        os.environ["ACCELERATE_MIXED_PRECISION"] = args.mixed_precision
    if file is None and (args.num_processes == 1 or (args.num_processes is None and not _several_gpus(args.cpu))):
        return None
    return _start(name, args, file)


def _several_gpus(cpu: bool) -> bool:
    """Whether `accelerate launch` without a flag would start more than one process."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return not cpu and (torch.cuda.device_count() > 1 or Path(default_config_file).is_file())


def _start(name: str, args: Namespace, file: Path | None) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = [] if file is None else ["--config_file", str(file)]
    if file is None:  # said, because accelerate warns of defaults
        args.mixed_precision = args.mixed_precision or "no"
        flags = ["--num_machines", "1", "--dynamo_backend", "no"]
        flags += ["--main_process_port", "0"]  # a free one: two runs may share a machine
        flags += ["--multi_gpu"] if (args.num_processes or 1) > 1 else []
    for flag in ("num_processes", "machine_rank", "main_process_ip", "mixed_precision"):
        flags += [] if getattr(args, flag) is None else [f"--{flag}", str(getattr(args, flag))]
    words = _without_launch_flags(args.words)
    os.environ["T2SDA_COMMAND"] = shlex.join(["t2sda", name, *args.words])  # for the record of the run
    try:
        launch_command(launch_command_parser().parse_args([*flags, "--module", "t2sda_hf", name, *words]))
    except subprocess.CalledProcessError as error:
        return _code(error.returncode)
    except ChildFailedError as error:
        return _code(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _without_launch_flags(words: list[str]) -> list[str]:
    """The words that the started processes get: all but those that `launch` has understood."""
    kept, left = [], list(words)
    while left:
        word = left.pop(0)
        flag = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and flag in (*_FLAGS, "cpu"):
            if "=" not in word and flag != "cpu":
                left.pop(0)
            continue
        kept.append(word)
    return kept


def _code(returned: int) -> int:
    """The exit code of a process by what its parent saw: 128 + number of the signal that ended it."""
    return 128 - returned if returned < 0 else returned


def words_of(args: Namespace) -> list[str]:
    """The launch flags that a command was given, for the commands that it runs."""
    given = [f"--{flag}={value}" for flag in _FLAGS if (value := getattr(args, flag)) is not None]
    return given + ["--cpu"] * args.cpu


class Runner:
    """Runs one command at a time in a group of its own, and passes signals on to it."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped_by = 0

    def __enter__(self) -> "Runner":
        self.before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: object) -> None:
        self.stopped_by = number
        if self.child is not None and self.child.poll() is None:
            os.killpg(self.child.pid, number)

    def t2sda(self, *words: str) -> int:
        """The exit code of a command of ours.

        Raises:
            Stopped: if it, or this process, was told to stop. Nothing is started after that.
        """
        code = self.run([sys.executable, "-m", "t2sda_hf", *words])
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise Stopped(code - 128, "the same command goes on from here")
        return code

    def run(self, command: Sequence[str]) -> int:
        """The exit code of a command; 128 + number of a signal that came before, and it is not started."""
        if self.stopped_by:
            return 128 + self.stopped_by
        self.child = subprocess.Popen(command, start_new_session=True)
        if self.stopped_by:  # while it was being started
            self._pass_on(self.stopped_by, None)
        code = self.child.wait()
        while self.stopped_by and _alive(self.child.pid):
            time.sleep(0.1)  # the launcher dies of a signal at once, the run behind it writes its checkpoint first
        return _code(code)


def _alive(group: int) -> bool:
    """Whether a process of the group still works (one that ended and was not fetched does not)."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False

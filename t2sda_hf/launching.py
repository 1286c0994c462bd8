"""In which processes a command runs: in this one, in those that accelerate starts, or in one after the other."""

import argparse
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
from typing import Any

import psutil
import yaml

from .config import RECIPES, find_recipe
from .errors import SIGNALS, Stopped, heard
from .training.stopping import LAUNCHED

# The flags of commands that several processes may run.
FLAGS: dict[str, dict[str, Any]] = {
    "--num_processes": {
        "type": int,
        "metavar": "N",
        "help": "number of processes on all machines; default: one for each GPU",
    },
    "--accelerate_config": {
        "metavar": "FILE",
        "help": "single_gpu, multi_gpu, multi_node, fsdp2, or a file that `accelerate config` wrote",
    },
    "--cpu": {"action": "store_true", "help": "use only the CPU"},
    "--machine_rank": {"type": int, "metavar": "N", "help": "with multi_node: the number of this machine, from 0"},
    "--main_process_ip": {"metavar": "HOST", "help": "with multi_node: the address of machine 0"},
    "--mixed_precision": {
        "choices": ("no", "bf16"),
        "help": "precision of the networks; overrides that of the accelerate config file",
    },
}
_OF_ACCELERATE = ("num_processes", "machine_rank", "main_process_ip", "mixed_precision")


def launch(name: str, args: Namespace) -> int | None:
    """Start the processes that a command line asks for, and wait for them.

    One process is this one: nothing is started, and exit codes and signals are its own. Several are started as
    `accelerate launch` does: from the file that is named, from the one that `accelerate config` has written, or with
    one process per GPU.

    Args:
        name: of the command.
        args: with `FLAGS`, the command's own words, and the door it came through.

    Returns:
        The exit code, or None if this process is to do the work.

    Raises:
        ValueError: for flags that do not fit together, or that a launcher has to be given.
    """
    if args.door != "t2sda" or any(variable in os.environ for variable in LAUNCHED):
        if given := words_of(args):
            raise ValueError(
                f"this process was started by a launcher: give {' '.join(given)} to that, not to t2sda {name}."
            )
        return None
    if args.num_processes is not None and args.num_processes < 1:
        raise ValueError(f"--num_processes must be at least 1, got {args.num_processes}.")
    if args.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if args.accelerate_config is not None:
        shipped = sorted(path.stem for path in (RECIPES / "accelerate").glob("*.yaml"))
        file: Path | None = find_recipe(args.accelerate_config, "accelerate", shipped)
    else:
        file = None if args.cpu else _file_of_user()
    if _alone(args, file):
        if args.mixed_precision is not None:
            os.environ["ACCELERATE_MIXED_PRECISION"] = args.mixed_precision
        return None
    return _start(name, args, file)


def _file_of_user() -> Path | None:
    """What `accelerate config` has written, if it was called."""
    from accelerate.commands.config.config_args import default_config_file

    return Path(default_config_file) if Path(default_config_file).is_file() else None


def _alone(args: Namespace, file: Path | None) -> bool:
    """Whether one process is asked for. Then what a file says besides is set for this one."""
    if file is None:
        return (args.num_processes or (1 if args.cpu else _num_gpus())) <= 1
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    try:
        asked = load_config_from_file(str(file))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is no file of `accelerate config`: {error}. Mend or remove it, or give another "
            "--accelerate_config."
        ) from error
    if asked.distributed_type != DistributedType.NO or (args.num_processes or asked.num_processes) != 1:
        return False
    os.environ["ACCELERATE_MIXED_PRECISION"] = str(asked.mixed_precision)
    if asked.use_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if asked.gpu_ids not in (None, "all"):
        os.environ["CUDA_VISIBLE_DEVICES"] = str(asked.gpu_ids)
    if backend := asked.dynamo_config.get("dynamo_backend"):
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = str(backend)  # training refuses it, and says what to set instead
    return True


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _start(name: str, args: Namespace, file: Path | None) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if file is None:  # said, because accelerate warns of defaults; a free port, because two runs may share a machine
        flags = ["--multi_gpu", "--num_machines=1", "--dynamo_backend=no", "--main_process_port=0"]
        flags += [f"--num_processes={args.num_processes or _num_gpus()}"]
        flags += [f"--mixed_precision={args.mixed_precision or 'no'}"]
    else:
        flags = [f"--config_file={file}", *(word for word in words_of(args) if word[2:].startswith(_OF_ACCELERATE))]
    os.environ["T2SDA_COMMAND"] = shlex.join(["t2sda", name, *args.words])  # for the record of the run
    # torch's launcher passes these on, and waits: a step and a save may take longer than its half minute.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in heard())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    try:
        launch_command(launch_command_parser().parse_args([*flags, "--module", "t2sda_hf", name, *_own(args.words)]))
    except subprocess.CalledProcessError as error:
        return _code(error.returncode)
    except ChildFailedError as error:
        return _code(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        del os.environ["T2SDA_COMMAND"]
    return 0


def _own(words: Sequence[str]) -> list[str]:
    """The words that the started processes get: all but `FLAGS`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, how in FLAGS.items():
        parser.add_argument(flag, **how)
    return parser.parse_known_args(words)[1]


def _code(returned: int) -> int:
    """The exit code of a process by what its parent saw: 128 + number of the signal that ended it."""
    return 128 - returned if returned < 0 else returned


def words_of(args: Namespace) -> list[str]:
    """The launch flags that a command was given, for the commands that it runs."""
    given = ((flag, getattr(args, flag[2:])) for flag in FLAGS)
    return [flag if value is True else f"{flag}={value}" for flag, value in given if value not in (None, False)]


def refuse_keys(overrides: Sequence[str], **instead: str) -> None:
    """Raise ValueError for keys of a run that its command decides, naming the flag to use instead."""
    for word in overrides:
        key = word[2:].partition("=")[0]
        if key in instead:
            raise ValueError(f"{key} is decided for each run: {instead[key]}.")


class Runner:
    """Runs one command at a time in a group of its own, and passes signals on to it."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped_by = 0

    def __enter__(self) -> "Runner":
        self.before = {number: signal.signal(number, self._pass_on) for number in heard()}
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
        if code - 128 in SIGNALS:
            raise Stopped(code - 128, "the same command goes on from here")
        return code

    def run(self, command: Sequence[str]) -> int:
        """The exit code of a command; 128 + number of a signal that came before, and it is not started."""
        if self.stopped_by:
            return 128 + self.stopped_by
        watched = os.environ | {"T2SDA_PARENT": str(os.getpid())}  # see `stopping.launcher`
        self.child = subprocess.Popen(command, start_new_session=True, env=watched)
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

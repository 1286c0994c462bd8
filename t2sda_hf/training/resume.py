"""Where a run goes on: one owner of its folder, one place to start each method from, nothing changed unnoticed."""

import errno
import hashlib
import json
import logging
import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout
from safetensors import SafetensorError, safe_open

from ..config import RunConfig, changes, differences, dump_config, flatten, read_yaml
from ..data.domains import Domain
from ..errors import LostFolder
from ..evaluation.run_folder import DATA_RECORD, RUN_RECORD
from ..masking import mask_known
from ..models import T2SDAForSemanticSegmentation
from ..storage import read_json
from .checkpoint import (
    Content,
    DamagedCheckpoint,
    Progress,
    check_fits,
    checkpoints,
    live_tensors,
    newest_valid,
    read_checkpoint,
    sweep,
    verify,
)
from .distributed import decided_by_main, shards, take_from_main
from .parts import Parts

logger = logging.getLogger(__name__)

LOCK, LEASE = ".lock", ".lease"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_LEASE_SECONDS = 30.0  # it is renewed three times as often
# All that a run has written that ended before it began to train.
_AT_THE_START = {name for file in (RUN_RECORD, DATA_RECORD) for name in (file, f".{file}.partial")} | {LOCK, LEASE}
_LOOKED_AT = 16  # images of a domain that are read for its fingerprint


@dataclass(frozen=True)
class Start:
    """Where one method starts: at a checkpoint, at the beginning (None), or not at all because it has results."""

    checkpoint: Path | None = None
    results: dict[str, Any] | None = None


@dataclass(frozen=True)
class Claim:
    """That this process alone writes into a folder."""

    folder: Path
    lock: BaseFileLock
    identity: tuple[int, int]  # of the lock's file; nobody else's has it as long as it is open here

    def check(self) -> None:
        """Raise LostFolder if the folder is not the one that was locked: it was removed, and perhaps made anew."""
        try:
            same = _identity(Path(self.lock.lock_file)) == self.identity
        except FileNotFoundError:
            same = False
        if not same:
            raise LostFolder(
                f"{self.folder} was removed, moved or replaced while the run wrote into it, and may be another run's "
                "now. Nothing more was written. Start again with another --output_dir."
            )


def locked(path: Path, timeout: float = -1) -> BaseFileLock:
    """Lock a file. Where the file system has no locks, a file beside it says who has it, and is renewed all the time.

    Args:
        path: of the file.
        timeout: how many seconds to wait for it; -1: as long as it takes.

    Raises:
        Timeout: if somebody else has it.
    """
    lock: BaseFileLock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "the file system of %s has no locks (%s): a file says who writes there, and is renewed every %.0f s.",
            path.parent,
            error.strerror,
            _LEASE_SECONDS / 3,
        )
        lock = SoftFileLease(path.with_name(LEASE), lease_duration=_LEASE_SECONDS, timeout=timeout)
        try:
            lock.acquire()
        except Timeout:
            if platform.node() in Path(lock.lock_file).read_text(encoding="utf-8"):
                raise  # of a process of this machine one knows whether it lives
            logger.warning("waiting for %.0f s to see whether it is renewed", _LEASE_SECONDS)
            lock.acquire(timeout=_LEASE_SECONDS + 5)
    return lock


def lock_run(cfg: RunConfig) -> Claim:
    """Make this process the only one that writes into `output_dir`; the system frees the lock when the process ends.

    Raises:
        ValueError: if another process has it, if the folder is not empty and nothing is to be resumed, or if it
            cannot be written.
    """
    folder = Path(cfg.output_dir)
    with ExitStack() as undo:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = locked(folder / LOCK, timeout=0)
            undo.callback(lock.release)
            check_folder(cfg)  # again: somebody may have used it since the first look
            if Path(lock.lock_file).name == LOCK:  # a lease says itself whose it is
                (folder / LOCK).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
            claim = Claim(folder, lock, _identity(Path(lock.lock_file)))
        except Timeout as error:
            owner = " ".join(Path(error.lock_file).read_text(encoding="utf-8").split()) or "another process"
            raise ValueError(
                f"output_dir {cfg.output_dir!r} is in use by {owner}. Wait for it, end it, or pass another "
                "--output_dir."
            ) from None
        except OSError as error:
            raise ValueError(
                f"output_dir {cfg.output_dir!r} cannot be written: {error}. Pass another --output_dir."
            ) from error
        undo.pop_all()
    return claim


def check_folder(cfg: RunConfig) -> None:
    """Raise ValueError if `output_dir` holds something that is not to be resumed."""
    folder = Path(cfg.output_dir)
    if not folder.is_dir() or all(path.name in (LOCK, LEASE) for path in folder.iterdir()):
        return
    if cfg.resume is None:
        raise ValueError(
            f"output_dir {cfg.output_dir!r} exists and is not empty. Nothing is overwritten: "
            "pass another --output_dir, remove the folder yourself, or go on with the run in it with --resume auto."
        )
    if not any((folder / method).is_dir() for method in methods_of(cfg)) and not _only_begun(folder):
        raise ValueError(
            f"output_dir {cfg.output_dir!r} is not empty and holds no run of this config. Pass another one."
        )


def _only_begun(folder: Path) -> bool:
    """Whether all in a folder is what a run of ours has written that ended before it trained: on a full disk, say."""
    return all(path.name in _AT_THE_START for path in folder.iterdir())


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def methods_of(cfg: RunConfig) -> list[Any]:
    """What a run trains, in this order."""
    return [cfg.baseline] * (cfg.baseline != "none") + [cfg.method]


def config_of(cfg: RunConfig, method: Any) -> RunConfig:
    """The config of one of them, which says the same whether the run was resumed or not."""
    return replace(cfg, method=method, baseline="none", resume=None, allow_changes=())


def kept_values(cfg: RunConfig) -> dict[str, Any]:
    """Dotted keys of the run that is to go on, as it resolved them; {} if there is none."""
    if cfg.resume is None:
        return {}
    folders = [Path(cfg.output_dir) / method for method in methods_of(cfg)]
    if cfg.resume != "auto":
        folders.insert(0, Path(cfg.resume).parent)
    written = (folder / "resolved_config.yaml" for folder in folders)
    return next((flatten(read_yaml(path)) for path in written if path.is_file()), {})


def describe(cfg: RunConfig, source: str, target: str | None, accelerator: Accelerator) -> dict[str, Any]:
    """What a method's weights depend on, for JSON. `source` and `target` are fingerprints of the data it reads."""
    return {
        "config": json.loads(json.dumps(yaml.safe_load(mask_known(dump_config(cfg))))),  # as it will be read
        "source_data": source,
        "target_data": target,
        "num_processes": accelerator.num_processes,
        "sharded": shards(accelerator),
        "versions": {name: version(name) for name in ("t2sda_hf", "torch", "transformers", "accelerate")},
    }


def fingerprint(domain: Domain, counts: np.ndarray | None = None) -> str:
    """A number for the content of a domain, wherever it lies: how many images, what their ids mean, the pixels per
    class of every label map (`counts`), and the bytes of some files."""
    digest = hashlib.sha256(str(len(domain)).encode())
    for array in (domain.ids, domain.valid, counts):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    rows = domain.rows
    for index in np.unique(np.linspace(0, len(domain) - 1, _LOOKED_AT).astype(int)):
        row = rows[int(index)]
        for column in ("image", "label"):
            cell = row.get(column)
            if cell is not None and cell["bytes"] is not None:
                digest.update(cell["bytes"])
            elif cell is not None and Path(cell["path"]).is_file():
                digest.update(Path(cell["path"]).read_bytes())
            else:  # in an archive, or no such column
                digest.update(domain.image(int(index)).tobytes())
    return digest.hexdigest()


def plan(cfg: RunConfig, records: dict[str, dict[str, Any]], accelerator: Accelerator) -> dict[str, Start]:
    """Where each method of the run starts. Collective; the main process looks, and must hold the lock.

    Args:
        cfg: `resume` is None, "auto", or the path of a checkpoint.
        records: `describe` of each method, in the order they are trained.
        accelerator: to tell the others.

    Raises:
        ValueError: if a checkpoint is damaged beyond falling back, or was made by a run that differs in what
            influences the result and is not in `allow_changes`. All differences are listed.
    """
    starts: dict[str, Start] = decided_by_main(lambda: _plan(cfg, records), accelerator, ValueError)
    return starts


def load_run(checkpoint: Path | None, parts: Parts, accelerator: Accelerator) -> Progress:
    """Put a checkpoint into the parts of a run. Collective; only the main process reads.

    Raises:
        DamagedCheckpoint: on every process, and nothing was changed.
    """
    if checkpoint is None:
        return Progress()

    live = live_tensors(parts.networks.student, parts.networks.teacher, parts.optimizer)
    read: list[Content] = []

    def load() -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
        content = read_checkpoint(checkpoint, T2SDAForSemanticSegmentation)
        check_fits(content, live)
        read.append(content)
        return content.state, content.processes

    state, processes = decided_by_main(load, accelerator, DamagedCheckpoint)
    for part, tensors in live.items():
        for name, tensor in tensors.items():
            take_from_main(tensor, getattr(read[0], part)[name] if read else None, accelerator)
    own: dict[str, dict[str, torch.Tensor]] = {"log": {}}
    # Another number of processes has to be allowed.
    for name, value in processes[accelerator.process_index % len(processes)].items():
        # Before it had a name of its own, the watch was written as a part of the memory.
        part, _, rest = name.replace("memory.watch.", "watch.").partition(".")
        own.setdefault(part, {})[rest] = value
    for part, module in parts.own.items():
        module.load_state_dict(own[part])
    return Progress(state["step"], state["skipped"], own["log"])


def _plan(cfg: RunConfig, records: dict[str, dict[str, Any]]) -> dict[str, Start]:
    if cfg.resume is None:
        return {method: Start() for method in records}
    given = None if cfg.resume == "auto" else Path(cfg.resume)
    given_state = None if given is None else _check_given(given, Path(cfg.output_dir), list(records))
    starts: dict[str, Start] = {}
    for method, record in records.items():
        folder = Path(cfg.output_dir) / method
        sweep(folder)
        if given is not None and given_state is not None and given_state["method"] == method:
            path, state = given, given_state
        else:
            found = newest_valid(folder)
            if found is None:
                starts[method] = Start()
                logger.info("%s: no checkpoint yet, starting at the beginning", method)
                continue
            path, state = found
        _compare(state, record, path, cfg.allow_changes)
        results = read_json(folder / "metrics.json")
        finished = state["step"] >= record["config"]["train"]["max_steps"]
        if finished and results and _loads(folder / "student"):  # else they are made again from the checkpoint
            starts[method] = Start(path, results)
            logger.info("%s: finished before", method)
        else:
            starts[method] = Start(path)
            logger.info("%s: going on after step %d from %s", method, state["step"], path)
    return starts


def _loads(model: Path) -> bool:
    """Whether the files of a saved model are whole."""
    try:
        return read_json(model / "config.json") is not None and all(
            safe_open(file, "pt").keys() for file in (*model.glob("*.safetensors"), model / "model.safetensors")
        )
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be loaded (%s): it is made again.", model, error)
        return False


def _check_given(given: Path, output_dir: Path, methods: Sequence[str]) -> dict[str, Any]:
    """State of the checkpoint a user named."""
    try:
        state = verify(given)
    except DamagedCheckpoint as error:
        raise ValueError(
            f"cannot resume from {str(given)!r}: {error}. Give another one, or --resume auto for the newest valid one."
        ) from error
    if state["method"] not in methods:
        raise ValueError(
            f"{str(given)!r} is a checkpoint of {state['method']}, and this run trains {', '.join(methods)}."
        )
    here = checkpoints(output_dir / state["method"])
    if here and here[-1].resolve() != given.resolve():
        raise ValueError(
            f"{str(given)!r} is not the newest checkpoint of {str(output_dir)!r}: that is {here[-1].name}. "
            "To branch off from it, pass another --output_dir; to go on, --resume auto."
        )
    return state


def _compare(state: dict[str, Any], record: dict[str, Any], path: Path, allowed: Sequence[str]) -> None:
    """Say what differs from the run that wrote a checkpoint; refuse what would change the result."""
    changed = differences(state["config"], record["config"])
    for key in ("source_data", "target_data", "num_processes", "sharded"):
        if state.get(key, record[key]) != record[key]:
            changed[key] = (state[key], record[key])
    for name, now_version in record["versions"].items():
        if state["versions"].get(name) != now_version:
            logger.warning("resuming with %s %s, %s before", name, now_version, state["versions"].get(name))
    refused = []
    for key, (old, new) in changed.items():
        text = f"{key}: {old!r} before, {new!r} now"
        if changes(key) != "learning" or _under(key, allowed):
            logger.warning("resuming with another %s", text)
        else:
            refused.append(text)
    if refused:
        names = ", ".join(text.split(":", 1)[0] for text in refused)
        raise ValueError(
            f"{path} was written by another run, which would have another result: {'; '.join(refused)}. "
            f'Go back to what it was, or allow it by name: --allow_changes "[{names}]".'
        )


def _under(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)

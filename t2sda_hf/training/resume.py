"""Where a run goes on: one owner of its folder, one place to start each method from, nothing changed unnoticed."""

import errno
import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout
from safetensors import SafetensorError, safe_open

from ..config import RunConfig, changes, differences, dump_config, flatten, read_yaml, several, without_place
from ..data.contents import Contents, difference, digest
from ..data.domains import AnyDomain, JointDomain
from ..data.sources import DRAWN
from ..errors import LostFolder
from ..evaluation.run_folder import DATA_RECORD, RUN_RECORD
from ..masking import mask_known
from ..models import T2SDAForSemanticSegmentation
from ..storage import foreign_json, read_json, refuse_inside
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
from .distributed import done_by_main, shards, take_from_main
from .parts import Parts
from .store import inputs_of_result

logger = logging.getLogger(__name__)

LOCK, LEASE = ".lock", ".lease"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# Where something lies that is read: its content is compared, under this name.
_PLACES: dict[str, str] = {
    "model.pretrained": "start_weights",
    "start_model": "finished_weights",
    "translate.trained.folder": "translated_images",
    "translate.trained.model": "translator_weights",
    "translate.style.images": "style_images",
    "translate.style.adain": "style_weights",
    "translate.style.randomization": "style_weights",
} | {f"test.{key}": "test_data" for key in ("path", "label_path", "valid_mask")}
# What each process of a run may have of its own; places may differ, too.
_OWN = ("output_dir", "resume", "data.num_workers", "train.num_threads")
_LEASE_SECONDS = 30.0  # it is renewed three times as often
# All that a run has written that ended before it began to train.
_AT_THE_START = (LOCK, LEASE, *(name for file in (RUN_RECORD, DATA_RECORD) for name in (file, f".{file}*.partial")))
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
    """Raise ValueError if `output_dir` holds something that is not to be resumed, or would be read as data."""
    folder = Path(cfg.output_dir)
    holds_a_run = any(_is_method(folder / method) for method in methods_of(cfg))
    if not holds_a_run and not (folder / LOCK).exists():  # a run that is there already may go on where it is
        domains = (*cfg.sources, *cfg.targets, *cfg.tests, *several(cfg.target_labelled))
        read = [path for one in domains for path in (one.path, one.label_path) if path not in DRAWN]
        refuse_inside(folder, read, "--output_dir")
    if not folder.is_dir() or all(path.name in (LOCK, LEASE) for path in folder.iterdir()):
        return
    if cfg.resume is None:
        raise ValueError(
            f"output_dir {cfg.output_dir!r} exists and is not empty. Nothing is overwritten: "
            "pass another --output_dir, remove the folder yourself, or go on with the run in it with --resume auto."
        )
    if not holds_a_run and not _only_begun(folder, cfg):
        raise ValueError(
            f"output_dir {cfg.output_dir!r} is not empty and holds no run of this config. Pass another one."
        )


def _is_method(folder: Path) -> bool:
    """Whether a folder is that of a method, by what a run writes there first."""
    return (folder / "resolved_config.yaml").is_file() or bool(checkpoints(folder))


def _only_begun(folder: Path, cfg: RunConfig) -> bool:
    """Whether all in a folder is what a run of ours has written that ended before it trained: on a full disk, say."""
    if foreign_json(folder / RUN_RECORD, {"command"}) or foreign_json(folder / DATA_RECORD, {"domains"}):
        return False
    return all(
        any(fnmatch(path.name, pattern) for pattern in _AT_THE_START)
        or (path.name in methods_of(cfg) and path.is_dir() and all(map(_is_partial, path.iterdir())))
        for path in folder.iterdir()
    )


def _is_partial(path: Path) -> bool:
    """Whether a file is of a write that was cut, the first one of a method."""
    return fnmatch(path.name, ".resolved_config.yaml*.partial")


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
    """Dotted keys of the run that is to go on, as it resolved them; {} if there is none, or if it has learned nothing
    that could go on."""
    if cfg.resume is None:
        return {}
    folders = [folder for method in methods_of(cfg) if checkpoints(folder := Path(cfg.output_dir) / method)]
    if cfg.resume != "auto":
        folders.insert(0, Path(cfg.resume).parent)
    written = (folder / "resolved_config.yaml" for folder in folders)
    return next((flatten(read_yaml(path)) for path in written if path.is_file()), {})


def describe(
    cfg: RunConfig,
    source: str | None,
    target: str | None,
    inputs: Mapping[str, Contents],
    test: Contents,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What a method's weights depend on, and what its scores do, for JSON.

    Args:
        cfg: of the method.
        source, target: `fingerprint` of the data it reads, by which older checkpoints are compared.
        inputs: all that it reads to learn.
        test: what it is scored on.
        accelerator: of this process.
    """
    scoring = {key: value for key, value in flatten(asdict(cfg)).items() if changes(key) == "scoring"}
    return {
        "inputs": {name: contents.record() for name, contents in inputs.items()},
        "scored": {
            "test_data": test.fingerprint,
            "source_data": inputs[f"{cfg.labels_from}_data"].fingerprint,
            "settings": json.loads(
                json.dumps({k: value for k, value in scoring.items() if without_place(k) not in _PLACES})
            ),
        },
        "rounding": {"CPU threads": torch.get_num_threads(), "device": accelerator.device.type},
        "config": json.loads(json.dumps(yaml.safe_load(mask_known(dump_config(cfg))))),  # as it will be read
        "source_data": source,
        "target_data": target,
        "num_processes": accelerator.num_processes,
        "sharded": shards(accelerator),
        "versions": {name: version(name) for name in ("t2sda_hf", "torch", "transformers", "accelerate")},
    }


def fingerprint(domain: AnyDomain, counts: np.ndarray | None = None) -> str:
    """By what checkpoints of earlier releases know a domain: how many images, what their ids mean, the pixels per class
    of every label map (`counts`), and the bytes of some files. `Contents` know every byte."""
    if isinstance(domain, JointDomain):  # which no earlier release knew
        return hashlib.sha256("".join(map(fingerprint, domain.parts)).encode()).hexdigest()
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


def check_agreement(
    cfg: RunConfig, records: Mapping[str, Mapping[str, Any]], contents: Mapping[str, Contents], accelerator: Accelerator
) -> None:
    """Whether all processes do the same: their settings, what they read, and their code. Collective.

    Args:
        cfg: of the run.
        records: `describe` of each method.
        contents: by their names in `records`.

    Raises:
        ValueError: on every process, naming the first one that differs from process 0, and all that differs.
    """
    if accelerator.num_processes == 1:
        return
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    local = lambda key: key in _OWN or without_place(key) in _PLACES or changes(key) == "placement"  # noqa: E731
    mine = {
        "host": platform.node(),
        "settings": {key: value for key, value in flatten(asdict(cfg)).items() if not local(key)},
        "inputs": {name: part.record() for name, part in contents.items()},
        "versions": records[cfg.method]["versions"] | {"python": platform.python_version()},
        "code": digest(*(file.read_bytes() for file in files)),
    }
    first, *others = gather_object([mine])
    for index, other in enumerate(others, 1):
        found = []
        for kind in ("settings", "versions"):
            pairs = {
                key: (other[kind].get(key), first[kind].get(key)) for key in first[kind].keys() | other[kind].keys()
            }
            found += [f"{key} is {one!r}, and {zero!r} there" for key, (one, zero) in pairs.items() if one != zero]
        for name in first["inputs"].keys() | other["inputs"].keys():
            one, zero = other["inputs"].get(name), first["inputs"].get(name)
            part = contents.get(name)
            if one is None or zero is None:
                found.append(f"only one of them reads {name}")
            elif said := difference(one, zero, part.unit if part else "parts", part.names if part else (), "there"):
                found.append(f"{name}: {said}")
        if not found and other["code"] != first["code"]:
            found.append("the code of t2sda_hf is another one")
        if found:
            raise ValueError(
                f"process {index} on {other['host']} differs from process 0 on {first['host']}: "
                f"{'; '.join(sorted(found))}. Start all of them with the same config, data and versions."
            )


def plan(
    cfg: RunConfig,
    records: dict[str, dict[str, Any]],
    accelerator: Accelerator,
    contents: Mapping[str, Contents],
) -> dict[str, Start]:
    """Where each method of the run starts. Collective; the main process looks, and must hold the lock.

    Args:
        cfg: `resume` is None, "auto", or the path of a checkpoint.
        records: `describe` of each method, in the order they are trained.
        accelerator: to tell the others.
        contents: what is read, by its name in the records, for messages.

    Raises:
        ValueError: if a checkpoint is damaged beyond falling back, or was made by a run that differs in what
            influences the result and is not in `allow_changes`. All differences are listed.
    """
    starts: dict[str, Start] = done_by_main(lambda: _plan(cfg, records, contents), accelerator, ValueError)
    return starts


# Buffers that checkpoints of earlier releases do not have. They start anew.
ADDED = ("labelled_pixels",)


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

    state, processes = done_by_main(load, accelerator, DamagedCheckpoint)
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
        added = {name: buffer for name, buffer in module.named_buffers() if name in ADDED}
        module.load_state_dict(added | own[part])
    return Progress(state["step"], state["skipped"], own["log"])


def _plan(cfg: RunConfig, records: dict[str, dict[str, Any]], contents: Mapping[str, Contents]) -> dict[str, Start]:
    if cfg.resume is None:
        return {method: Start() for method in records}
    given = None if cfg.resume == "auto" else Path(cfg.resume)
    given_state = None if given is None else _check_given(given, Path(cfg.output_dir), list(records))
    starts: dict[str, Start] = {}
    sweep(Path(cfg.output_dir))
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
        _compare(state, record, path, cfg.allow_changes, contents)
        results = read_json(folder / "metrics.json")
        finished = state["step"] >= record["config"]["train"]["max_steps"]
        if finished and results and _loads(folder / "student"):  # else they are made again from the checkpoint
            stale = stale_scores(folder, results, record)
            starts[method] = Start(path, None if stale else results)
            logger.info("%s: finished before%s", method, f", and scored again: {stale}" if stale else "")
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


def _compare(
    state: dict[str, Any],
    record: dict[str, Any],
    path: Path,
    allowed: Sequence[str],
    contents: Mapping[str, Contents],
) -> None:
    """Say what differs from the run that wrote a checkpoint; refuse what would change the result."""
    changed = differences(state["config"], record["config"])
    changed.pop("train.num_threads", None)  # what it makes of it is compared below
    before, now = state.get("inputs"), record["inputs"]
    compared = ["num_processes", "sharded"]
    if before is None:
        compared += ["source_data", "target_data"]
        unknown = sorted(now.keys() - {"source_data", "target_data"})
        logger.warning(
            "%s is of an earlier release: of its data some images are compared%s.",
            path,
            f", and nothing of {', '.join(unknown)}" if unknown else "",
        )
    for key in compared:
        if state.get(key, record[key]) != record[key]:
            changed[key] = (state[key], record[key])
    texts = {key: f"{key}: {old!r} before, {new!r} now" for key, (old, new) in changed.items()}
    both = {} if before is None else {name: before[name] for name in now if name in before}
    same = {name for name, told in both.items() if told["fingerprint"] == now[name]["fingerprint"]}
    texts |= {name: f"{name}: {contents[name].difference(both[name])}" for name in both.keys() - same}
    rounding = {
        name: (state.get(kind, {}).get(name), value)
        for kind in ("rounding", "versions")
        for name, value in record[kind].items()
    }
    other = [f"{name} {new} ({old} before)" for name, (old, new) in rounding.items() if old not in (None, new)]
    if other:
        logger.warning("resuming where sums may be rounded otherwise: %s", ", ".join(other))
    refused = []
    for key, text in texts.items():
        if changes(key) != "learning" or _under(key, allowed) or _PLACES.get(without_place(key)) in same:
            logger.warning("resuming with another %s", text)
        else:
            refused.append(text)
    if refused:
        names = ", ".join(text.split(":", 1)[0] for text in refused)
        raise ValueError(
            f"{path} was written by another run, which would have another result: {'; '.join(refused)}. "
            f'Go back to what it was, or allow it by name: --allow_changes "[{names}]".'
        )


def stale_scores(folder: Path, results: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """In words why the results of a method are not those of its weights, its test images and settings; "" if they are.

    Args:
        folder: of the method.
        results: its metrics.json.
        record: `describe` of it, as it is now.
    """
    for which, result in results.items():
        told, now = result.get("inputs"), inputs_of_result(folder, which, record)
        if told is None:
            return "an earlier release did not write down on what"
        for key, said in (("data", "images or labels"), ("settings", "settings"), ("weights", "weights")):
            if told.get(key) != now[key]:
                return f"the {said} of {which} were others"
    return ""


def _under(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)

"""Checkpoints: folders that exist completely or not at all, and are believed only if every byte is as written.

The live run goes into `.checkpoint-000020.partial/`, becomes `checkpoint-000020/` by one rename of one process, and
comes back from the newest folder whose manifest verifies. Only safetensors and JSON are written and read, no pickle.

    checkpoint-000020/
      student/, teacher/      from_pretrained folders; where the encoder is not trained as a whole, config.json and
                              what is trained, in trained.safetensors
      optimizer.safetensors   "<parameter>/exp_avg", "<parameter>/exp_avg_sq", "<parameter>/step"
      processes.safetensors   "<process>/memory.*" of its ClassMemory, "<process>/watch.*" of its Watch,
                              "<process>/log.*" for its next log line
      state.json              counters, and what the run was: config, data, classes, number of processes
      manifest.json           sha256 and size of every other file
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, DamagedCheckpoint
from ..evaluation.run_folder import BASELINE
from ..storage import sha256_of, share_weights, sync
from .adapters import frozen_names, without

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
WHOLE, TRAINED = "model.safetensors", "trained.safetensors"  # the weights of a network, all or what is trained
_STEP = re.compile(r"checkpoint-(\d+)")


@dataclass
class Progress:
    """What a run counts, and what its next log line needs of the steps already made."""

    step: int = 0  # finished updates
    skipped: int = 0  # updates left out because something was not finite
    log: dict[str, Tensor] = field(default_factory=dict)  # term -> its values since the last log line, of this process


@dataclass(frozen=True)
class Content:
    """A checkpoint in memory, on the CPU."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    processes: list[dict[str, Tensor]]
    state: dict[str, Any]


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by step, oldest first, whatever their files' times say; other names are none."""
    found = [path for path in folder.glob("checkpoint-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def left_in(output_dir: Path) -> str:
    """What of a run that ended is on the disk, and how to go on: a sentence that is true of its folder."""
    newest = [found[-1] for folder in sorted(output_dir.glob("*/")) if (found := checkpoints(folder))]
    if not newest:
        return "No checkpoint was written; the same command with --resume auto starts from the beginning."
    last = max(newest, key=lambda path: (path.parent.name != BASELINE, path.name))
    return f"The newest checkpoint is {last.parent.name}/{last.name}; go on with --resume auto."


def write_folder(target: Path, write: Callable[[Path], None], manifest: bool = True, needed: int = 0) -> None:
    """Let `write` fill a folder and make it visible as `target` only when all of it is on the disk.

    Call it on one process, and on no two at once. A folder of the same name is replaced.

    Args:
        target: where it shall appear.
        write: writes files into the folder it is given.
        manifest: add sizes and checksums of all files.
        needed: bytes it will take about, for the message.

    Raises:
        CheckpointError: if the disk is full, read-only or broken. No part of the folder is left, an older one stays.
    """
    partial, replaced = (target.with_name(f".{target.name}.{what}") for what in ("partial", "replaced"))
    try:
        for leftover in (partial, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        write(partial)
        share_weights(partial)
        if manifest:
            _write_json(partial / MANIFEST, _describe(partial))
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        sync(target.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise CheckpointError(f"{target} could not be written: {error}.{_space(target.parent, needed)}") from error


def write_checkpoint(
    target: Path,
    *,
    save: Callable[[nn.Module, Path], None],
    student: nn.Module,
    teacher: nn.Module,
    optimizer: Mapping[str, Tensor],
    processes: list[dict[str, Tensor]],
    state: Mapping[str, Any],
    frozen: frozenset[str] = frozenset(),
) -> None:
    """Write one checkpoint. Call it on one process.

    Args:
        target: its folder, see `checkpoint_folder`.
        save: writes a network as a `from_pretrained` folder.
        student, teacher: as they are, whole.
        optimizer: `optimizer_tensors`, whole.
        processes: per process what only it has, by name.
        state: JSON.
        frozen: names of the parameters that are not trained, and are left out.

    Raises:
        CheckpointError: see `write_folder`; also if a number to be saved is not finite: nobody can go on from it.
    """
    networks = {"student": student, "teacher": teacher}
    named = {part: without(network.state_dict(), frozen) for part, network in networks.items()}
    named["optimizer"] = dict(optimizer)
    for part, tensors in named.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{target} was not written: {part} tensor {name} holds a value that is not finite."
                )
    together = {f"{index}/{name}": value for index, own in enumerate(processes) for name, value in own.items()}

    def write(folder: Path) -> None:
        for part, network in networks.items():
            if frozen:
                network.config.save_pretrained(folder / part)  # type: ignore[operator, union-attr]
                own = {name: value.contiguous() for name, value in named[part].items()}
                save_file(own, folder / part / TRAINED)
            else:
                save(network, folder / part)
            if not (folder / part / (TRAINED if frozen else WHOLE)).is_file():
                raise FileNotFoundError(f"no weights were written into {part}")
        save_file(
            {name: value.contiguous() for name, value in named["optimizer"].items()}, folder / "optimizer.safetensors"
        )
        save_file({name: value.contiguous() for name, value in together.items()}, folder / "processes.safetensors")
        _write_json(folder / "state.json", {"format": FORMAT, "num_processes": len(processes), **state})

    write_folder(target, write, needed=sum(value.nbytes for tensors in named.values() for value in tensors.values()))


def keep_newest(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. Each loses its name first, so none is ever seen half deleted."""
    for path in checkpoints(folder)[:-keep]:
        deleted = path.with_name(f".{path.name}.deleted")
        path.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what an interrupted write or delete left. Only for the process that holds the lock of the run."""
    for what in ("partial", "replaced", "deleted"):
        for path in folder.glob(f".*.{what}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest.

    Returns:
        The content of state.json.

    Raises:
        DamagedCheckpoint: naming the first file that is missing, cut, changed, or lies outside the folder.
    """
    if (folder / MANIFEST).is_symlink():
        raise DamagedCheckpoint(f"{folder / MANIFEST} is a link")
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} is missing or not readable ({type(error).__name__})") from error
    needed = ["optimizer.safetensors", "processes.safetensors", "state.json"]
    for part in ("student", "teacher"):
        needed += [f"{part}/config.json", f"{part}/{TRAINED if f'{part}/{TRAINED}' in expected else WHOLE}"]
    for name in needed:
        if name not in expected:
            raise DamagedCheckpoint(f"{folder / MANIFEST} does not list {name}")
    for name, (size, digest) in expected.items():
        path, pure = folder / name, PurePosixPath(name)
        leaves = pure.is_absolute() or ".." in pure.parts
        if leaves or path.resolve() != folder.resolve() / name:  # also if a part is a link
            raise DamagedCheckpoint(f"{folder / MANIFEST} lists {name!r}, which lies outside the checkpoint")
        try:
            if path.stat().st_size != size or sha256_of(path) != digest:
                raise DamagedCheckpoint(f"{path} is not what {MANIFEST} says")
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        written = state["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{folder / 'state.json'} is not readable ({type(error).__name__})") from error
    if written != FORMAT:
        raise DamagedCheckpoint(f"{folder} has format {written!r}, this version reads {FORMAT}")
    return dict(state)


def newest_valid(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, and its state; None if there is no checkpoint.

    Damaged ones that are newer are said in the log and renamed to `damaged-checkpoint-...`, so that they are neither
    counted nor tried again.

    Raises:
        ValueError: if there are checkpoints, but not one is valid. Then nothing is renamed.
    """
    damaged: list[tuple[Path, DamagedCheckpoint]] = []
    for path in reversed(checkpoints(folder)):
        try:
            state = verify(path)
        except DamagedCheckpoint as error:
            damaged.append((path, error))
            continue
        for bad, why in damaged:
            logger.warning("%s is damaged and set aside: %s. Falling back to %s.", bad.name, why, path.name)
            aside = bad.with_name(f"damaged-{bad.name}")
            if aside.exists():
                shutil.rmtree(aside)
            bad.rename(aside)
        return path, state
    if damaged:
        raise ValueError(
            f"every checkpoint in {folder} is damaged ({'; '.join(str(why) for _, why in damaged)}). "
            "Copy one back from elsewhere, or remove them to start again."
        )
    return None


def read_checkpoint(folder: Path, network: type[PreTrainedModel]) -> Content:
    """Verify a checkpoint and read all of it.

    Args:
        folder: of the checkpoint.
        network: class of student and teacher. It reads them, because names in its files differ from those in memory.

    Raises:
        DamagedCheckpoint: if a file is not as written.
    """
    state = verify(folder)
    try:
        student, teacher = (_read_network(folder / part, network) for part in ("student", "teacher"))
        optimizer = load_file(folder / "optimizer.safetensors")
        together = load_file(folder / "processes.safetensors")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{folder} cannot be read: {error}") from error
    processes: list[dict[str, Tensor]] = [{} for _ in range(state["num_processes"])]
    for name, value in together.items():
        index, _, own = name.partition("/")
        processes[int(index)][own] = value
    return Content(student, teacher, optimizer, processes, state)


def live_tensors(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """What of a run a checkpoint is put into, by part and name, in the same order on every process."""
    allocate_state(optimizer)
    frozen = frozen_names(student)
    live = {"student": without(student.state_dict(), frozen), "teacher": without(teacher.state_dict(), frozen)}
    return live | {"optimizer": optimizer_tensors(student, optimizer)}


def check_fits(content: Content, live: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise DamagedCheckpoint naming the first tensor that is missing, unknown, or of another shape or type."""
    for part, tensors in live.items():
        read: dict[str, Tensor] = getattr(content, part)
        strangers = sorted(tensors.keys() ^ read.keys())
        if strangers:
            raise DamagedCheckpoint(f"{part} tensor {strangers[0]} is only in the checkpoint or only in the run")
        for name, tensor in tensors.items():
            given = read[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise DamagedCheckpoint(
                    f"{part} tensor {name} is {tuple(given.shape)} {given.dtype} in the checkpoint, and "
                    f"{tuple(tensor.shape)} {tensor.dtype} in the run"
                )


def optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's own tensors as "<parameter>/<what>". No learning rates: they follow from the step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value for parameter, own in optimizer.state.items() for key, value in own.items()
    }


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the zeros it would make at its first step, so that there is something to load or broadcast into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _read_network(folder: Path, network: type[PreTrainedModel]) -> dict[str, Tensor]:
    if (folder / TRAINED).is_file():
        return load_file(folder / TRAINED)
    loaded: Any = network.from_pretrained(folder, use_safetensors=True, local_files_only=True, output_loading_info=True)
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:  # transformers would go on with random weights
            raise DamagedCheckpoint(f"{folder} has {kind.replace('_', ' ')}: {sorted(report[kind])[0]}")
    return dict(model.state_dict())


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _space(folder: Path, needed: int) -> str:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    about = f" It takes about {needed / 1e6:.1f} MB," if needed else ""
    return f"{about} {free / 1e6:.1f} MB are free there."

"""What a method leaves in its folder while it trains."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..config import RunConfig, dump_config
from ..errors import LostFolder
from ..evaluation.run_folder import SELECTED
from ..evaluation.watch import SELECTED_FILE, describe_selected, drop_selected_after, selects
from ..masking import mask_known
from ..models import T2SDAImageProcessor
from ..storage import write_text
from .adapters import frozen_names, merged
from .checkpoint import (
    CheckpointError,
    Progress,
    checkpoint_folder,
    checkpoints,
    keep_newest,
    optimizer_tensors,
    write_checkpoint,
    write_folder,
)
from .distributed import decided_by_main, done_by_main, whole_network, whole_tensor
from .parts import Parts


def unasked() -> None:
    """For a folder that nobody else can know of."""


def inputs_of_result(folder: Path, which: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """On what one of a method's results depends: scores that were made of something else are made again.

    Args:
        folder: of the method, with its models.
        which: "student", "teacher", "selected", or one of the first two with "_source".
        record: `resume.describe` of the method.

    Returns:
        "data", a fingerprint of the images and labels; "settings" of the evaluation; "weights", a hash of them.
    """
    scored, model = record.get("scored", {}), which.removesuffix("_source")
    newest = checkpoints(folder)[-1:]
    places = {"student": folder / "student", "selected": folder / SELECTED}
    place = newest[0] / "teacher" if model == "teacher" and newest else places.get(model)
    return {
        "data": scored.get("test_data" if model == which else "source_data"),
        "settings": scored.get("settings"),
        "weights": None if place is None else weights_number(place),
    }


def weights_number(model: Path) -> str:
    """sha256 of the weights in a `from_pretrained` folder."""
    whole = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


@dataclass(frozen=True)
class Store:
    """The folder of one method: config, checkpoints, models, results.

    The main process writes, and all but `save` is collective: call it on every process.

    Attributes:
        folder: of the method.
        cfg: of the method.
        accelerator: of this process.
        processor: goes with every model.
        like: the student before it was sharded, see `whole_network`.
        record: what the weights depend on, from `build.records`; kept in every checkpoint.
        owned: raises LostFolder if the folder is not this run's any more. It is asked before
            checkpoints, models and results are written.
    """

    folder: Path
    cfg: RunConfig
    accelerator: Accelerator
    processor: T2SDAImageProcessor
    like: nn.Module
    record: Mapping[str, Any]
    owned: Callable[[], None] = unasked

    def open(self) -> None:
        """Make the folder, and write down the config; results of an earlier start are taken away."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "resolved_config.yaml", mask_known(dump_config(self.cfg)))
            (self.folder / "metrics.json").unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def forget_selected_after(self, step: int) -> None:
        """Take away weights that were selected after more than `step` updates, see `drop_selected_after`."""
        if self.accelerator.is_main_process:
            drop_selected_after(self.folder, step)

    def close(self, results: Mapping[str, Any]) -> None:
        """Write down the results."""
        if self.accelerator.is_main_process:
            self.owned()
            told = {
                which: result | {"inputs": inputs_of_result(self.folder, which, self.record)}
                for which, result in results.items()
            }
            write_text(self.folder / "metrics.json", json.dumps(told, indent=2))
        self.accelerator.wait_for_everyone()

    def save(self, network: nn.Module, target: Path) -> None:
        """Write a from_pretrained folder, adapters merged. Of one process, with a network that is whole."""
        merged(self.accelerator.unwrap_model(network)).save_pretrained(target)
        self.processor.save_pretrained(target)

    def save_student(self, student: nn.Module) -> nn.Module:
        """Write student/; returns the whole student.

        Raises:
            CheckpointError: on every process.
        """
        student = whole_network(student, self.like, self.accelerator)

        def write() -> None:
            self.owned()
            write_folder(self.folder / "student", lambda folder: self.save(student, folder), manifest=False)

        done_by_main(write, self.accelerator, CheckpointError, LostFolder)
        return student

    def save_selected(self, student: nn.Module, proxies: Mapping[str, float], done: int) -> None:
        """Keep the student if it is the best by `select`, after `done` updates.

        Raises:
            CheckpointError: on every process.
        """
        select = self.cfg.select
        if not decided_by_main(lambda: selects(self.folder, select, proxies), self.accelerator):
            return
        student = whole_network(student, self.like, self.accelerator)

        def write(folder: Path) -> None:
            self.save(student, folder)
            (folder / SELECTED_FILE).write_text(describe_selected(select, proxies, done), encoding="utf-8")

        def keep() -> None:
            self.owned()
            write_folder(self.folder / SELECTED, write, manifest=False)

        done_by_main(keep, self.accelerator, CheckpointError, LostFolder)

    def save_checkpoint(self, parts: Parts, progress: Progress) -> None:
        """Write a checkpoint, then delete old ones.

        Raises:
            CheckpointError: on every process.
        """
        named = [(name, *buffer) for name, module in parts.own.items() for buffer in module.named_buffers()]
        mine = {f"{name}.{buffer}": value.cpu() for name, buffer, value in named}
        mine |= {f"log.{name}": values for name, values in progress.log.items()}
        processes = gather_object([mine])
        student, teacher = (
            whole_network(network, self.like, self.accelerator)
            for network in (parts.networks.student, parts.networks.teacher)
        )
        own = optimizer_tensors(parts.networks.student, parts.optimizer)
        optimizer = {name: whole_tensor(tensor) for name, tensor in own.items()}

        def write() -> None:
            self.owned()
            write_checkpoint(
                checkpoint_folder(self.folder, progress.step),
                save=self.save,
                student=student,
                teacher=teacher,
                optimizer=optimizer,
                processes=processes,
                frozen=frozen_names(parts.networks.student),
                state={
                    "method": self.cfg.method,
                    "step": progress.step,
                    "skipped": progress.skipped,
                    **self.record,
                },
            )
            keep_newest(self.folder, self.cfg.train.keep_checkpoints)

        done_by_main(write, self.accelerator, CheckpointError, LostFolder)

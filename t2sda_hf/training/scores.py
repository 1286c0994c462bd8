"""How a run scores its networks while it trains."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..batch import normalize
from ..config import RunConfig
from ..data.domains import AnyDomain, Domain
from ..data.transforms import pad_image, random_window
from ..errors import RunFailed
from ..evaluation.evaluator import LabelledDomain, evaluate_models, evenly_spread, joint_result
from ..evaluation.figures import save_confusion
from ..evaluation.report import save_panel
from ..methods import Networks
from ..teacher import take_statistics, with_statistics_of
from .distributed import whole_network
from .stopping import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interruptible:
    """A domain for evaluation that raises Stopped at the next image after a signal, if there is something to ask.

    An image that was whole when the run began and cannot be read now is RunFailed.
    """

    domain: Domain
    stop: StopRequest | None

    @property
    def name(self) -> str:
        return self.domain.name

    def __len__(self) -> int:
        return len(self.domain)

    def check(self) -> None:
        if self.stop is not None:
            self.stop.check()

    def image(self, index: int) -> np.ndarray:
        with _read_later():
            return self.domain.image(index)

    def labels(self, index: int) -> np.ndarray:
        with _read_later():
            return self.domain.labels(index)


@contextmanager
def _read_later() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RunFailed(str(error)) from error


@dataclass(frozen=True)
class Evaluation:
    """Scores on the test domain and on images of the domain whose labels are learned. Collective, but for the pictures.

    Attributes:
        cfg: of the method.
        accelerator: of this process.
        source, test: domains.
        target: whose images the method adapts to; None for a method that does not.
        like: the student before it was sharded, see `whole_network`.
        stop: after a signal, one process alone ends in the middle of an evaluation. Several finish it together, or one
            would wait for the other.
    """

    cfg: RunConfig
    accelerator: Accelerator
    source: AnyDomain
    test: AnyDomain
    like: nn.Module
    stop: StopRequest
    target: AnyDomain | None = None

    def take_statistics(self, student: nn.Module) -> None:
        """Give the student the batch norm statistics of the target, if uda.target_statistics asks for them. Collective.

        Every process sees the same crops, so that all have the same statistics. Those of the training so far are lost,
        which no training forward reads.

        Raises:
            RunFailed: if none of the images can be read any more.
        """
        if self.target is None or not self.cfg.uda.target_statistics:
            return
        crops, lost = self._target_crops(self.target)
        if not crops:
            raise RunFailed(f"no image of {self.target.name} can be read for uda.target_statistics: {lost[0]}")
        if lost:  # as in training, which draws another one
            logger.warning("%d images are left out of the target's statistics. The first: %s", len(lost), lost[0])
        each = min(self.cfg.train.batch_size, len(crops))
        whole = range(0, len(crops) - each + 1, each)  # a smaller batch would weigh as much as the others
        stacked = (np.stack(crops[first : first + each]).transpose(0, 3, 1, 2) for first in whole)
        with self._as_written():
            take_statistics(
                student, (normalize(torch.from_numpy(batch).to(self.accelerator.device) / 255) for batch in stacked)
            )

    def _target_crops(self, target: AnyDomain) -> tuple[list[np.ndarray], list[str]]:
        """(H,W,3) uint8 crops of evenly spread images, always the same ones, and why others are missing. Several
        targets have them by their shares."""
        crops, lost, size = list[np.ndarray](), list[str](), self.cfg.data.crop_size
        for part, share in zip(target.parts, target.shares, strict=True):
            number = min(max(round(share * self.cfg.uda.target_statistics), 1), len(part))
            for index in np.linspace(0, len(part) - 1, number, dtype=int):
                try:
                    image = pad_image(part.resized_image(int(index)), size)
                except (ValueError, OSError) as error:
                    lost.append(str(error))
                    continue
                window = random_window((image.shape[0], image.shape[1]), size, np.random.default_rng(int(index)))
                crops.append(window.of(image))
        return crops, lost

    def results(self, networks: Networks) -> dict[str, dict[str, Any]]:
        """Results of `joint_result`: "student"; "teacher", unless it is never used; and both "..._source" if
        evaluation.source_images asks for them.

        Raises:
            Stopped: see `stop`.
        """
        models = {"student": self._whole(networks.student)}
        if not self.cfg.supervised:
            models["teacher"] = with_statistics_of(self._whole(networks.teacher), networks.student)
        found = self._score_on_test(models)
        if self.cfg.evaluation.source_images and self.source.labelled:
            each = -(-self.cfg.evaluation.source_images // len(self.source.parts))
            seen_before = [(evenly_spread(part, each, ", seen in training"), part) for part in self.source.parts]
            scored = self._score(models, seen_before, skip_unreadable=True)
            found |= {f"{name}_source": result for name, result in scored.items()}
            lost = found["student_source"]["unreadable"]
            if lost:  # as in training, which draws another one
                logger.warning(
                    "%d of the %d source images that are scored cannot be read any more and are left out. The first: "
                    "%s",
                    len(lost),
                    sum(len(shown) for shown, _ in seen_before),
                    lost[0],
                )
        return found

    def score(self, model: nn.Module) -> dict[str, Any]:
        """The result of a network on the test domain."""
        return self._score_on_test({"model": self._whole(model)})["model"]

    def _score_on_test(self, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
        stop = self.stop if self.accelerator.num_processes == 1 else None
        shown = [(Interruptible(part, stop), part) for part in self.test.parts]
        return self._score(models, shown, check=shown[0][0].check)

    def pictures(self, student: nn.Module, results: dict[str, dict[str, Any]], folder: Path) -> dict[str, Path]:
        """Draw the whole student's predictions and confusions for the trackers; the page of the run has its own.

        Args:
            student: not sharded.
            results: of `results`.
            folder: is made.

        Returns:
            PNG files by name; none without a tracker.
        """
        if not self.cfg.train.log_with:
            return {}
        method, classes = self.cfg.method, self.cfg.classes
        panels = {name: folder / f"{name}.png" for name in ("predictions", "confusion")}
        folder.mkdir(exist_ok=True)
        with self._as_written():
            save_panel(
                panels["predictions"],
                self.test,
                {method: student.eval()},
                self.test.input_size,
                classes,
                **self.cfg.evaluation.windows,
            )
        save_confusion(panels["confusion"], {method: np.array(results["student"]["confusion"])}, classes)
        return panels

    def _score(
        self, models: Mapping[str, nn.Module], shown: Sequence[tuple[LabelledDomain, Domain]], **more: Any
    ) -> dict[str, dict[str, Any]]:
        """The results of whole networks on what is shown of each domain."""
        how = self.cfg.evaluation
        with self._as_written():
            each = [
                evaluate_models(
                    models,
                    images,
                    image_size=domain.input_size(),
                    classes=self.cfg.classes,
                    accelerator=self.accelerator,
                    limit=how.limit,
                    workers=self.cfg.data.num_workers or 0,
                    **how.windows,
                    **more,
                )
                for images, domain in shown
            ]
        return {name: joint_result([results[name] for results in each]) for name in models}

    def _whole(self, network: nn.Module) -> nn.Module:
        return whole_network(network, self.like, self.accelerator)

    def _as_written(self) -> AbstractContextManager[Any]:
        # Images of another size, once in thousands of steps, are not worth another compilation.
        return torch.compiler.set_stance("force_eager") if self.cfg.train.compile != "none" else nullcontext()

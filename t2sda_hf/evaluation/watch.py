"""What a run shows of itself while it trains, without one more forward: proxies and pseudo-label pictures.

A proxy is a number in [0,1], larger is hoped to be better, that needs no label of the target. It is gathered over the
updates between two evaluations from what the objective computed anyway (`Graph.seen`).

    confidence  1 - entropy / log K of the teacher's classes on target crops
    coverage    share of target pixels on which the teacher is as sure as uda.pseudo_threshold
    agreement   share of target pixels of mixed images where the student says what the teacher says
    stability   1 - distance of the class shares of the pseudo-labels from those of the updates before
    prior       1 - distance of the class shares of the pseudo-labels from those of the source's labels
    source      mIoU of the student on its source crops
    combined    geometric mean of agreement, confidence and prior

Distance of shares is total variation, half the sum of absolute differences.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..device import constant
from ..models.image_processing_t2sda import sample_nearest
from ..storage import read_json
from .confusion import scores
from .pictures import Column, save_grid
from .run_folder import SELECTED

MIN_PANELS = 4
SELECTED_FILE = "selected.json"


class Watch(nn.Module):
    """Sums over the updates since the last `read`. Buffers only, so it is saved, restored and rolled back as a model.

    Args:
        source_counts: (K,) pixels per class in the labels of the source.
        threshold: confidence from which a pixel counts as covered.
    """

    sums: Tensor  # (5,) float64: target pixels, 1 - entropy, sure ones; target pixels of mixed images, agreeing ones
    shares: Tensor  # (K,) float64 pixels per pseudo-class
    before: Tensor  # (K,) float64 the same of the updates before the last `read`
    confusion: Tensor  # (K,K) float64 of the student on source crops

    def __init__(self, source_counts: Sequence[int], threshold: float) -> None:
        super().__init__()
        counts = torch.tensor(list(source_counts), dtype=torch.float64)
        num_classes = len(counts)
        self.threshold = threshold
        self.prior = counts / counts.sum().clamp(min=1)
        self.register_buffer("sums", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("shares", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("before", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("confusion", torch.zeros(num_classes, num_classes, dtype=torch.float64))

    @torch.no_grad()
    def look(self, seen: Mapping[str, Any]) -> None:
        """Add one batch, at the resolution of the logits; nothing is moved off the device.

        Args:
            seen: `Graph.seen` of all graphs of the batch: teacher_logits (B,K,h,w); mixed_logits (B,K,h,w) and
                from_source (B,H,W) bool; source_logits (B,K,h,w) and source_labels (B,H,W). What is missing is not
                counted.
        """
        num_classes, one = len(self.shares), constant((1.0,), self.shares.device, torch.float64)
        if "teacher_logits" in seen:
            shares = seen["teacher_logits"].float().softmax(dim=1)
            entropy = torch.special.entr(shares).sum(dim=1)
            confidence, pseudo_labels = shares.max(dim=1)
            pixels = constant((1.0,), entropy.device).view(1, 1, 1).expand_as(entropy)
            certainty = torch.sub(pixels, entropy, alpha=1 / math.log(num_classes))
            counts = [pixels, certainty, confidence >= self.threshold]
            self.shares.index_add_(0, pseudo_labels.flatten(), one.expand(entropy.numel()))
            if "mixed_logits" in seen:
                logits = seen["mixed_logits"]
                of_target = ~sample_nearest(seen["from_source"], (logits.shape[-2], logits.shape[-1]))
                counts += [of_target, (logits.argmax(dim=1) == pseudo_labels) & of_target]
            self.sums[: len(counts)].add_(torch.stack(counts).sum(dim=(1, 2, 3), dtype=torch.float64))
        if "source_logits" in seen:
            logits = seen["source_logits"]
            labels = sample_nearest(seen["source_labels"], (logits.shape[-2], logits.shape[-1]))
            pairs = torch.add(logits.argmax(dim=1), labels, alpha=num_classes).flatten()
            found = one.new_zeros(256 * num_classes)  # also for ignored pixels
            found.index_add_(0, pairs, one.expand(len(pairs)))
            self.confusion.add_(found[: num_classes**2].view_as(self.confusion))

    def read(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The proxies of the updates since the last call; those that nothing was seen for are left out. Collective.

        Args:
            sum_over_processes: sums a tensor over all processes.
        """
        flat = torch.cat([self.sums, self.shares, self.confusion.flatten()])
        num_classes = len(self.shares)
        sums, shares, confusion = sum_over_processes(flat).cpu().split([5, num_classes, num_classes**2])
        found: dict[str, float] = {}
        if sums[0]:
            found["confidence"] = max(float(sums[1] / sums[0]), 0.0)  # where nothing is known, rounding gives less
            found["coverage"] = float(sums[2] / sums[0])
            shares = shares / shares.sum()
            if self.before.sum():
                found["stability"] = 1 - _distance(shares, self.before.cpu())
            found["prior"] = 1 - _distance(shares, self.prior)
            self.before.copy_(shares)
        if sums[3]:
            found["agreement"] = float(sums[4] / sums[3])
        if confusion.sum():
            found["source"] = float(scores(confusion.view(num_classes, num_classes).numpy())["mean_iou"])
        parts = [found.get(name) for name in ("agreement", "confidence", "prior")]
        if None not in parts:
            found["combined"] = math.prod(part for part in parts if part is not None) ** (1 / 3)
        for buffer in (self.sums, self.shares, self.confusion):
            buffer.zero_()
        return found


def falls(values: Sequence[float]) -> int:
    """How many times in a row a series has fallen up to its end."""
    number = 0
    while number + 1 < len(values) and values[-1 - number] < values[-2 - number]:
        number += 1
    return number


def selects(folder: Path, select: str, proxies: Mapping[str, float]) -> bool:
    """Whether weights are the best so far: their proxy is above that of the ones kept in `folder`/selected.

    Args:
        folder: of the method.
        select: "last", which keeps none, or "proxy:<name>". What was kept by another proxy does not count.
        proxies: of these weights, from `Watch.read`. Without the one that is asked for they are not kept.
    """
    name = select.removeprefix("proxy:")
    kept = read_selected(folder)
    return name in proxies and (kept is None or kept["proxy"] != name or proxies[name] > kept["value"])


def read_selected(folder: Path) -> dict[str, Any] | None:
    """proxy, value and step of the weights kept in `folder`/selected; None if there are none."""
    kept: dict[str, Any] | None = read_json(folder / SELECTED / SELECTED_FILE)
    return kept


def drop_selected_after(folder: Path, step: int) -> None:
    """Take away weights that were kept after more than `step` updates: a run that goes on from there meets them again.

    If nothing was changed it meets the same ones, bit by bit, and keeps them again.
    """
    kept = read_selected(folder)
    if kept is not None and kept["step"] > step:
        shutil.rmtree(folder / SELECTED)


def describe_selected(select: str, proxies: Mapping[str, float], done: int) -> str:
    """Content of `SELECTED_FILE`: which proxy, its value, and after how many updates."""
    name = select.removeprefix("proxy:")
    return json.dumps({"proxy": name, "value": proxies[name], "step": done})


def panel_due(done: int, max_steps: int, evaluate_every: int) -> bool:
    """Whether pseudo-labels are pictured after `done` updates: at evaluations, or at four evenly spread updates."""
    if max_steps // evaluate_every >= MIN_PANELS:
        return done % evaluate_every == 0 or done == max_steps
    return done in {max_steps * part // MIN_PANELS for part in range(1, MIN_PANELS + 1)}


def save_panel_of_step(folder: Path, done: int, seen: Mapping[str, Any], classes: Sequence[str]) -> Path | None:
    """Picture what the objective saw in the running update: target image, pseudo-label, confidence, mix, translation.

    Args:
        folder: `panels/` of the method; the file is step_NNNNNN.png.
        done: number of finished updates.
        seen: `Graph.seen` of all graphs of the batch.
        classes: names, for colours and legend.

    Returns:
        The file, or None if the objective makes no pseudo-labels.
    """
    if "pseudo_labels" not in seen:
        return None
    num = min(2, len(seen["pseudo_labels"]))
    columns = [
        Column("target image", _images(seen, "target_images", num)),
        Column("pseudo-label", _maps(seen, "pseudo_labels", num), "classes"),
        Column("confidence", _maps(seen, "confidence", num), "confidence"),
        Column("mixed image (student's input)", _images(seen, "mixed_images", num)),
        Column("source image", _images(seen, "source_images", num)),
        Column("translated to target style", _images(seen, "pseudo_target_images", num)),
    ]
    sure = float(seen["confidence"].mean())
    title = f"after {done} updates: mean confidence {sure:.2f}"
    if "trust" in seen:
        title += f", weight of pseudo-labels {float(seen['trust']):.2f}"
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"step_{done:06d}.png", folder / ".partial.png"
    save_grid(partial, [column for column in columns if column.pictures], classes, title)
    return partial.replace(path)  # at once: a run that is killed leaves no half of a picture


def _images(seen: Mapping[str, Any], name: str, num: int) -> list:
    if name not in seen:
        return []
    images = (seen[name][:num].detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return list(images.permute(0, 2, 3, 1).cpu().numpy())


def _maps(seen: Mapping[str, Any], name: str, num: int) -> list:
    return list(seen[name][:num].detach().cpu().numpy())


def _distance(shares: Tensor, others: Tensor) -> float:
    return float((shares - others).abs().sum() / 2)

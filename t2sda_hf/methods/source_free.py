"""Source-free adaptation: a finished model and images of the target, and nothing else.

Legend: B batch, K classes, E channels before the classifier, H×W image, h×w feature map; t target, o the other one
that is pasted, m mixed.
x images in [0,1], y labels, w pixel weights.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..augment.class_mix import sample_class_mix
from ..batch import normalize, shown_ids
from ..labels import IGNORE_INDEX
from .pseudo_labels import pseudo_labels_of
from .pull import augmented, before_classifier, pull_graph
from .step import Graph, Step
from .t2sda import draw_box, masked_graph, mixed_graph


def source_free_losses(step: Step) -> Iterator[Graph]:
    """L_target of target images pasted into each other, L_mask, L_pull to the classifier's weights, and an anchor.

    What the model knows of the source is in its weights alone. So its classifier's rows, one for each class, stand for
    the source: they are keys, prototypes and source negatives of the pull, among features before the classifier.

    Args and Yields: as `t2sda_losses`, without "source".
    """
    cfg, weights = step.cfg, step.cfg.loss_weights
    x_t = step.batch.target_images
    if x_t is None:
        raise ValueError("source_free adapts to target images, and the batch has none.")
    seen: dict[str, Any] = {"target_images": x_t}
    with torch.no_grad():
        output = step.networks.teacher(normalize(x_t), output_hidden_states=step.pulls)
    pseudo_labels = pseudo_labels_of(step, output.logits)
    y_t, trust = pseudo_labels.labels, pseudo_labels.pixel_weights  # (B,H,W), (B,H,W)
    seen |= pseudo_labels.seen

    # L_target: each image gets classes of the one before it; nothing is pasted that is not trusted.
    if weights.target:
        x_o, w_o = x_t.roll(1, 0), trust.roll(1, 0)
        y_o = torch.where(w_o > 0, y_t.roll(1, 0), IGNORE_INDEX)
        pasted = sample_class_mix(y_o, shown_ids(y_o).cpu(), "image", step.generator) & (w_o > 0)  # (B,H,W) bool
        x_m = augmented(step, torch.where(pasted[:, None], x_o, x_t))
        y_m, w_m = torch.where(pasted, y_o, y_t), torch.where(pasted, w_o, trust)
        p_t = pseudo_labels.probabilities
        p_m = None if p_t is None else torch.where(pasted[:, None], p_t.roll(1, 0), p_t)
        box = draw_box(cfg, y_m, step.generator)
        yield mixed_graph(step, x_m, y_m, w_m, seen | {"from_source": pasted, "trust": trust.mean()}, box, p_m)

    # L_mask (MIC), as in t2sda.
    if weights.masked_consistency:
        yield masked_graph(step, augmented(step, x_t), pseudo_labels.learned, trust, seen)

    # L_pull: what is predicted as a class must embed like the classifier's row of it.
    if step.pulls:
        with torch.no_grad():
            of_target = before_classifier(step.networks.teacher, output.hidden_states)
            keys = {"source": classifier_keys(step.networks.teacher, of_target), "target": of_target}
        size = (len(x_t), of_target.shape[-2], of_target.shape[-1])
        labels = classifier_labels(len(cfg.classes), size, x_t.device)
        rows = replace(step, batch=replace(step.batch, source_labels=labels))
        yield pull_graph(rows, {"target": x_t}, keys, replace(pseudo_labels, inside=(trust > 0).float()), seen)

    if weights.anchor and step.networks.start is not None:
        pairs = zip(step.networks.student.parameters(), step.networks.start.parameters(), strict=True)
        differences = [own - first for own, first in pairs if own.requires_grad]
        yield Graph({"anchor": sum((part.square().sum() for part in differences), x_t.new_zeros(())) / 2}, {})


def classifier_keys(network: Any, like: Tensor) -> Tensor:
    """The classifier's rows as a map of keys, (B,E,h,w) as `like`: its first K pixels are those of the K classes.

    Their labels are `classifier_labels`; the other pixels have none, so nothing reads them.
    """
    rows = network.decode_head.classifier.weight.flatten(1)  # (K,E)
    keys = like.new_zeros(like.shape[0], *like.shape[2:], like.shape[1])  # (B,h,w,E)
    keys.view(-1, like.shape[1])[: len(rows)] = rows
    return keys.permute(0, 3, 1, 2)


def classifier_labels(num_classes: int, size: tuple[int, int, int], device: torch.device) -> Tensor:
    """(B,h,w) int64 of `classifier_keys`: 0 to K-1 in its first pixels, then 255."""
    labels = torch.full((size[0] * size[1] * size[2],), IGNORE_INDEX, device=device)
    labels[:num_classes] = torch.arange(num_classes, device=device)
    return labels.view(size)

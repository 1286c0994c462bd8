"""Distillation: a small student learns what a finished, larger model says of source and target.

Legend: B batch, K classes, h×w logits; s source, t target, st source in target style. x images in [0,1], y labels.
"""

from collections.abc import Iterator
from typing import Any

import torch

from ..batch import normalize
from ..losses.segmentation import segmentation_loss, soft_label_loss
from .pseudo_labels import pseudo_labels_of
from .pull import augmented, pull_graph
from .step import Graph, Step
from .t2sda import pseudo_target


def distil_losses(step: Step) -> Iterator[Graph]:
    """L_distil on both domains, L_source, and L_pull among the embeddings of the student.

    The finished model sees images as they are, and the student their strong augmentation. It takes the teacher's place:
    pseudo-labels of the pull are its own. Keys are those of the student's average, which has the student's projector.

    Args and Yields: as `t2sda_losses`, with "distil" in the place of "target".
    """
    weights, finished = step.cfg.loss_weights, step.networks.start
    x_s, y_s, x_t = step.batch.source_images, step.batch.source_labels, step.batch.target_images
    if x_t is None or finished is None:
        raise ValueError("distil needs target images and a finished model.")
    both = torch.cat([x_s, x_t])
    with torch.no_grad():
        soft = finished(normalize(both)).logits  # (2B,K,h,w)
    pseudo_labels = pseudo_labels_of(step, soft[len(x_s) :])
    seen: dict[str, Any] = {"source_images": x_s, "target_images": x_t} | pseudo_labels.seen

    if weights.distil or weights.source:
        logits = step.networks.student(normalize(augmented(step, both))).logits
        losses = {"distil": soft_label_loss(logits, soft)} if weights.distil else {}
        if weights.source:
            losses["source"] = segmentation_loss(logits[: len(x_s)], y_s, step.weigh_labelled())
        seen_s = {"source_labels": y_s, "source_logits": logits[: len(x_s)].detach()}
        yield Graph(losses, seen | seen_s)

    if step.pulls:
        x_st = seen["pseudo_target_images"] = pseudo_target(step) if step.translates else x_s
        yield pull_graph(step, {"source": x_s, "ptarget": x_st, "target": x_t}, {}, pseudo_labels, seen)

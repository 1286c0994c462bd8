"""What the teacher says of the target, and how far it is believed (paper section 3.1 and eq. 17-18; method 2.5, 5.8).

Legend: B batch, K classes, D embedding size, H×W image, h×w feature map; s source, t target.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import normalize
from ..device import constant
from ..losses.pull import class_confidences, class_weights, confidence_sums
from ..teacher import class_probabilities, pseudo_label_weights, surest_of_each_class, trusted_rows, undoubted
from .step import Step


@dataclass(frozen=True)
class PseudoLabels:
    """Labels of the target by the teacher, without a gradient.

    Attributes:
        logits: (B,K,h,w) they come from.
        labels: (B,H,W) int64 in [0,K).
        confidence: (B,H,W) in [0,1].
        pixel_weights: (B,H,W) in [0,1], how far they are trusted in a loss.
        inside: (B,H,W), 0 in the margins and where the batch says so, elsewhere 1: where they may count at all. Not
            their weight, which is 0 everywhere if nothing is sure.
        class_weights: (K,) w* of DRW, sum 1.
        probabilities: (B,K,H,W) of all classes, where these are learned in place of the labels (`uda.pseudo_labels:
            soft`); else None.
    """

    logits: Tensor
    labels: Tensor
    confidence: Tensor
    pixel_weights: Tensor
    inside: Tensor
    class_weights: Tensor
    probabilities: Tensor | None = None

    @property
    def learned(self) -> Tensor:
        """What `segmentation_loss` takes as labels: (B,H,W) labels, or (B,K,H,W) probabilities."""
        return self.labels if self.probabilities is None else self.probabilities

    @property
    def seen(self) -> dict[str, Tensor]:
        """For `Graph.seen`."""
        names = {"teacher_logits": self.logits, "pseudo_labels": self.labels, "confidence": self.confidence}
        return names | {"pixel_weights": self.pixel_weights}


@torch.no_grad()
def look_at_target(step: Step, target_images: Tensor) -> tuple[PseudoLabels, dict[str, Tensor]]:
    """Ask the teacher for labels of the target and, if there will be a pull, for keys (B,D,h,w) by domain.

    Keys are those of "target". Of "source", too, if the teacher looks at both domains in one forward.
    """
    teacher, x_s = step.networks.teacher, step.batch.source_images
    if step.pulls and step.cfg.pull.teacher_forward == "joint":
        both = teacher(normalize(torch.cat([x_s, target_images])), project=True)
        keys_s, keys_t = both.embeddings.split([len(x_s), len(target_images)])
        return pseudo_labels_of(step, both.logits[len(x_s) :]), {"source": keys_s, "target": keys_t}
    output = teacher(normalize(target_images), project=step.pulls)
    return pseudo_labels_of(step, output.logits), {"target": output.embeddings} if step.pulls else {}


def pseudo_labels_of(step: Step, logits: Tensor) -> PseudoLabels:
    """Labels of the target and their weights, from the teacher's logits (B,K,h,w)."""
    uda, balance, images = step.cfg.uda, step.cfg.balance, step.batch.target_images
    assert images is not None
    probabilities = class_probabilities(logits, (images.shape[-2], images.shape[-1]))
    confidence, labels = probabilities.max(dim=1)
    margins, valid = (uda.ignore_top, uda.ignore_bottom), step.batch.target_valid
    inside = trusted_rows(confidence, *margins) if valid is None else trusted_rows(confidence, *margins) * valid
    if uda.weight_scope == "class":
        share, sure = uda.class_share, uda.pseudo_threshold
        weights = surest_of_each_class(labels, confidence, inside, share, sure, len(step.cfg.classes))
    else:
        weights = pseudo_label_weights(confidence, uda.pseudo_threshold, uda.weight_scope, *margins)
        weights = weights if valid is None else weights * valid
    if balance.doubt:
        rarity = step.memory.class_weights(balance.cap)
        rarity = torch.where(step.memory.labelled_pixels > 0, rarity, rarity.min())  # what no label shows is not rare
        weights = weights * undoubted(probabilities, labels, rarity**balance.doubt)
    importance = dynamic_weights(step, labels, confidence, inside)
    soft = probabilities if uda.pseudo_labels == "soft" else None
    return PseudoLabels(logits, labels, confidence, weights, inside, importance, soft)


def dynamic_weights(step: Step, labels: Tensor, confidence: Tensor, inside: Tensor) -> Tensor:
    """w* of DRW (paper eq. 17-18), (K,), of `PseudoLabels`; the same for every class of the benchmark if it is off."""
    drw, memory = step.cfg.drw, step.memory
    if drw.apply_to == "none" or not (step.cfg.loss_weights.pull or drw.apply_to == "target"):
        return equal_weights(step)
    valid = inside > 0 if drw.use_valid_mask else None
    sums = step.sum_over_processes(confidence_sums(labels, confidence, len(step.cfg.classes), valid))
    confidences = class_confidences(sums, drw.absent_conf, memory.confidences)
    if drw.absent_conf == "ema":
        memory.remember_confidences(confidences, sums[1] > 0)
    return class_weights(confidences, step.members, drw.beta)


def equal_weights(step: Step) -> Tensor:
    """(K,) 1/C for the classes of the benchmark, 0 for others."""
    wanted, device = step.cfg.pull.class_set or step.cfg.classes, step.batch.source_labels.device
    return constant(tuple((name in wanted) / step.num_members for name in step.cfg.classes), device)

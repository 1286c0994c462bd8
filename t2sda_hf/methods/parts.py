"""What an objective works with."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..translate import TranslationEngine


class ClassMemory(nn.Module):
    """Running class statistics for the two choices that remember: prototypes, and confidences of absent classes.

    Buffers only, so it is saved and loaded like a model. Both start at 0; a class is remembered once it was seen.
    """

    prototypes: Tensor  # (K,D) float32
    seen: Tensor  # (K,) bool
    confidences: Tensor  # (K,) float64

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(num_classes, dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("confidences", torch.zeros(num_classes, dtype=torch.float64))

    def remember_prototypes(self, prototypes: Tensor, present: Tensor, momentum: float) -> Tensor:
        """momentum·old + (1-momentum)·new for present classes, the new one at first sight; returns all, (K,D)."""
        old_share = momentum * self.seen.float()
        blended = old_share[:, None] * self.prototypes + (1 - old_share)[:, None] * prototypes
        self.prototypes = torch.where(present[:, None], blended, self.prototypes)
        self.seen = self.seen | present
        return self.prototypes

    def remember_confidences(self, confidences: Tensor, present: Tensor, momentum: float = 0.99) -> None:
        self.confidences = torch.where(
            present, momentum * self.confidences + (1 - momentum) * confidences, self.confidences
        )


@dataclass(frozen=True)
class Parts:
    """The networks and the translation engine of a run. Only the student is trained.

    `seen` holds what the objective looked at in the running micro-batch, detached, for whoever wants to watch:
    target_images, teacher_logits, pseudo_labels, confidence; source_images, source_labels, source_logits,
    pseudo_target_images; mixed_images, mixed_logits, from_source. References only: nothing is computed for it.
    """

    student: nn.Module
    teacher: nn.Module
    imagenet: nn.Module | None  # frozen encoder of the feature distance; None if its weight is 0
    translate: TranslationEngine
    memory: ClassMemory
    seen: dict[str, Tensor] = field(default_factory=dict)

"""The lower bound: supervised training on the source alone."""

from collections.abc import Callable, Iterator

from torch import Generator, Tensor

from ..augment.color import photometric_distortion
from ..batch import UdaBatch, normalize
from ..config import RunConfig
from ..losses.segmentation import segmentation_loss
from .parts import Parts


def source_only_losses(
    batch: UdaBatch,
    parts: Parts,
    cfg: RunConfig,
    step: int,
    generator: Generator,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Iterator[dict[str, Tensor]]:
    """Cross-entropy on photometrically distorted source images (method 3.4, last paragraphs)."""
    images = photometric_distortion(batch.source_images, generator)
    yield {"source": segmentation_loss(parts.student(normalize(images)).logits, batch.source_labels)}

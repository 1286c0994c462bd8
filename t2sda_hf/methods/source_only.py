"""The lower bound: supervised training on the source alone."""

from collections.abc import Callable, Iterator

from torch import Generator, Tensor

from ..augment.color import photometric_distortion
from ..batch import UdaBatch, normalize
from ..config import RunConfig
from .parts import Parts
from .t2sda import draw_box, fused_and_detail_loss


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
    labels = batch.source_labels
    output = parts.student(normalize(images), detail_box=draw_box(cfg, labels, generator))
    yield {"source": fused_and_detail_loss(output, labels, cfg)}

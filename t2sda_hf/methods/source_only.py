"""The bounds: supervised training on the source alone (lower), or on the labels of the target (upper)."""

from collections.abc import Iterator

from ..augment.color import photometric_distortion
from ..batch import normalize
from .step import Graph, Step
from .t2sda import draw_box, fused_and_detail_loss


def source_only_losses(step: Step) -> Iterator[Graph]:
    """Cross-entropy on photometrically distorted images with labels (method 3.4, last paragraphs).

    They are the source's; of target_only those of the target, which stand in their place from `open_domains` on.
    """
    images = photometric_distortion(step.batch.source_images, step.generator)
    labels = step.batch.source_labels
    output = step.networks.student(normalize(images), detail_box=draw_box(step.cfg, labels, step.generator))
    yield Graph({"source": fused_and_detail_loss(output, labels, step.cfg, step.weigh_labelled())}, {})

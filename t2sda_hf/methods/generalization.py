"""Domain generalisation: no target at all, the style comes from elsewhere (paper section 4.2, Table 6; method 5.12).

Legend: s source, st source in another style. x images in [0,1].
"""

from collections.abc import Iterator

from ..augment.color import photometric_distortion
from ..models.multi_resolution import context_images
from .pull import pull_graph, translates_context
from .step import Graph, Step
from .t2sda import source_graph


def generalization_losses(step: Step) -> Iterator[Graph]:
    """L_source + λ·L_pull: supervised training, and the restyled scene pulled to the source.

    What needs a target is gone: pseudo-labels, class mixing, class weights by confidence (all classes weigh the same)
    and target negatives (all come from the source). The teacher makes keys of the undistorted source.

    Args and Yields: as `t2sda_losses`, without "target" and what is seen of it.
    """
    cfg, x_s = step.cfg, step.batch.source_images
    if cfg.loss_weights.source or cfg.loss_weights.feature_distance:
        yield source_graph(step, photometric_distortion(x_s, step.generator), {}, step.weigh_labelled())

    if step.pulls:
        x_st = x_s
        if cfg.translates:
            scene = context_images(x_s) if translates_context(cfg) else x_s
            x_st = step.networks.translate(scene, None, step.generator)
        yield pull_graph(step, {"source": x_s, "ptarget": x_st}, keys={}, pseudo_labels=None, seen={})

"""Domain generalisation: no target at all, the style comes from elsewhere (paper section 4.2, Table 6; method 5.12).

Legend: B batch, K classes, H×W image; s source, st source in another style. x images in [0,1], y labels.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from ..augment.color import photometric_distortion
from ..batch import UdaBatch
from ..config import RunConfig
from ..models.multi_resolution import context_images
from .parts import Parts
from .t2sda import embed, num_members, pull_term, source_terms, translates_context


def generalization_losses(
    batch: UdaBatch,
    parts: Parts,
    cfg: RunConfig,
    step: int,
    generator: Generator,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Iterator[dict[str, Tensor]]:
    """L_source + λ·L_pull: supervised training, and the restyled scene pulled to the source.

    What needs a target is gone: pseudo-labels, class mixing, class weights by confidence (all classes weigh the same)
    and target negatives (all come from the source). The teacher makes keys of the undistorted source.

    Args and Yields: as `t2sda_losses`, without "target" and "trust".
    """
    x_s, y_s, weights = batch.source_images, batch.source_labels, cfg.loss_weights
    if weights.source or weights.feature_distance:
        yield source_terms(photometric_distortion(x_s, generator), y_s, parts, cfg, generator)

    if weights.pull > 0 and step >= cfg.pull.start_step:
        x_st = x_s
        if cfg.translates:
            x_st = parts.translate(context_images(x_s) if translates_context(cfg) else x_s, None, generator)
        with torch.no_grad():
            keys = {"source": embed(parts.teacher, x_s, "source", cfg)}
        everything_alike = torch.full((len(cfg.classes),), 1 / num_members(cfg), device=x_s.device)
        yield pull_term(
            {"source": x_s, "ptarget": x_st},
            keys,
            y_s,
            None,
            None,
            None,
            everything_alike,
            parts,
            cfg,
            generator,
            sum_over_processes,
        )

"""T2S-DA: pull target to source. DACS, DAFormer, HRDA and MIC are configs of it: a weight of 0 costs nothing.

Legend: B batch, K classes, H×W image; s source, t target, st source in target style (pseudo-target), m mixed, k masked.
x images in [0,1], y labels, w pixel weights, w* class weights.

With HRDA (method 5.9) the network itself joins context and detail. What is left of it here: every student forward on a
labelled image draws a detail box, the loss has a detail part, and the pull, the feature distance and the translation
live on the context, at half size.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from ..augment.class_mix import sample_class_mix
from ..augment.color import StrongAugmentation, photometric_distortion, strong_augment
from ..augment.patch_mask import mask_patches
from ..batch import normalize
from ..config import RunConfig
from ..device import constant
from ..losses.feature_distance import feature_distance
from ..losses.segmentation import as_probabilities, segmentation_loss
from ..models import T2SDAOutput
from ..models.multi_resolution import Box, context_images, cut, draw_detail_box
from .pseudo_labels import look_at_target
from .pull import draw_augmentation, pull_graph, translates_context
from .step import Graph, Step


def t2sda_losses(step: Step) -> Iterator[Graph]:
    """The T2S-DA objective on one batch (paper section 3): one `yield` per autograd graph, so it can be freed at once.

    Raises:
        ValueError: if the batch lacks target images, or what a translation needs.
    """
    cfg, weights, generator = step.cfg, step.cfg.loss_weights, step.generator
    x_s, y_s, x_t = step.batch.source_images, step.batch.source_labels, step.batch.target_images
    if x_t is None:
        raise ValueError("t2sda adapts to target images, and the batch has none: give a target, or use source_only.")
    seen: dict[str, Any] = {"source_images": x_s, "target_images": x_t}
    w_s = step.weigh_labelled()  # (B,H,W), or None: all weigh 1

    # The teacher looks at the target first: labels, and keys of it (jointly: of both domains).
    if step.adapts and (weights.target or weights.masked_consistency or step.pulls):
        pseudo_labels, keys = look_at_target(step, x_t)
        y_t, trust = pseudo_labels.labels, pseudo_labels.pixel_weights  # (B,H,W), (B,H,W)
        seen |= pseudo_labels.seen
    x_st = seen["pseudo_target_images"] = pseudo_target(step) if step.translates else x_s

    # L_source: learn the source, and stay near ImageNet on things.
    if weights.source or weights.feature_distance:
        x_l = x_s if step.source_ce_on == "source" else x_st
        x_l = photometric_distortion(x_l, generator) if cfg.augment.source == "photometric" else x_l
        yield source_graph(step, x_l, seen, w_s)

    # What the student sees of the target, in other colours: mixed with source classes, and to be masked (MIC).
    views: dict[str, Tensor] = {}
    colors: dict[str, StrongAugmentation] = {}
    if step.adapts and weights.target:
        from_source = sample_class_mix(y_s, step.batch.ids_shown(), cfg.mix.classes_from, generator)  # (B,H,W) bool
        views["mixed"] = torch.where(from_source[:, None], x_s if cfg.mix.source == "source" else x_st, x_t)
        colors["mixed"] = draw_augmentation(step, x_t)
        box = draw_box(cfg, y_s, generator)
    if step.adapts and weights.masked_consistency:
        views["masked"], colors["masked"] = x_t, draw_augmentation(step, x_t)
    views = dict(zip(views, strong_augment([*views.values()], [*colors.values()]), strict=True))

    # L_target: learn the target from the teacher, on source classes pasted into target images.
    if "mixed" in views:
        x_m, y_m = views["mixed"], torch.where(from_source, y_s, y_t)
        p_m = None  # (B,K,H,W), learned in place of the labels if the teacher's probabilities are
        if pseudo_labels.probabilities is not None:
            p_s = as_probabilities(y_s, len(cfg.classes))
            p_m = torch.where(from_source[:, None], p_s, pseudo_labels.probabilities)
        # DRW on the target has mean 1 over classes.
        w_t = trust * step.num_members * pseudo_labels.class_weights[y_t] if cfg.drw.apply_to == "target" else trust
        w_m = torch.where(from_source, constant((1.0,), w_t.device) if w_s is None else w_s, w_t)
        yield mixed_graph(step, x_m, y_m, w_m, seen | {"from_source": from_source, "trust": w_t.mean()}, box, p_m)

    # L_mask (MIC): say the same of the target although patches of it are hidden.
    if "masked" in views:
        yield masked_graph(step, views["masked"], pseudo_labels.learned, trust, seen)

    # L_pull: the same scene in target style must embed like its class does in the source.
    if step.pulls:
        yield pull_graph(step, {"source": x_s, "ptarget": x_st, "target": x_t}, keys, pseudo_labels, seen)


def source_graph(step: Step, images: Tensor, seen: Mapping[str, Any], pixel_weights: Tensor | None = None) -> Graph:
    """L_source of labelled images, and their feature distance; those of weight 0 are left out.

    Args:
        step: see `Step`.
        images: (B,3,H,W) in [0,1], of `step.batch.source_labels`.
        seen: what the objective has looked at already.
        pixel_weights: (B,H,W) in the cross-entropy, or None.
    """
    cfg, labels, weights = step.cfg, step.batch.source_labels, step.cfg.loss_weights
    pixels = step.normalized(images)
    output = step.networks.student(
        pixels,
        segment=weights.source > 0,
        detail_box=draw_box(cfg, labels, step.generator) if weights.source else None,
        output_hidden_states=weights.feature_distance > 0,
    )
    losses = {}
    if weights.source:
        seen = {**seen, "source_labels": labels, "source_logits": output.logits.detach()}
        losses["source"] = fused_and_detail_loss(output, labels, cfg, pixel_weights)
    if weights.feature_distance and step.networks.imagenet is not None:
        with torch.no_grad():
            context = context_images(pixels) if cfg.hrda.enabled else pixels
            frozen = step.networks.imagenet(context).last_hidden_state
        names = cfg.feature_distance.classes  # () is every pixel; names the run does not have are no pixel
        things = [cfg.classes.index(name) for name in names if name in cfg.classes] if names else None
        losses["feature_distance"] = feature_distance(
            output.hidden_states[-1], frozen, labels, len(cfg.classes), things, cfg.feature_distance.min_ratio
        )
    return Graph(losses, seen)


def mixed_graph(
    step: Step,
    images: Tensor,
    labels: Tensor,
    pixel_weights: Tensor,
    seen: Mapping[str, Any],
    box: Box | None,
    probabilities: Tensor | None = None,
) -> Graph:
    """L_target of mixed images (B,3,H,W) in [0,1], their labels (B,H,W) and the weights of these (B,H,W).

    `box` is of `draw_box`. Where there are probabilities (B,K,H,W), these are learned, and the labels are for the
    pictures.
    """
    output = step.networks.student(normalize(images), detail_box=box)
    mixed = {"mixed_images": images, "mixed_labels": labels, "mixed_weights": pixel_weights}
    loss = fused_and_detail_loss(output, labels if probabilities is None else probabilities, step.cfg, pixel_weights)
    return Graph({"target": loss}, {**seen, **mixed, "mixed_logits": output.logits.detach()})


def masked_graph(step: Step, images: Tensor, labels: Tensor, pixel_weights: Tensor, seen: Mapping[str, Any]) -> Graph:
    """L_mask of target images (B,3,H,W) in [0,1], `PseudoLabels.learned` and the weights of these (B,H,W)."""
    how = step.cfg.patch_mask
    pixels = mask_patches(normalize(images), how.block_size, how.ratio, step.generator)
    output = step.networks.student(pixels, detail_box=draw_box(step.cfg, labels, step.generator))
    return Graph({"masked_consistency": fused_and_detail_loss(output, labels, step.cfg, pixel_weights)}, seen)


def pseudo_target(step: Step) -> Tensor:
    """x_st (B,3,H,W): source crops cut out of translated outer windows. HRDA: of half their size (method 5.9).

    Labelled crops of the target stay as they are, whatever the engine.
    """
    batch, translate = step.batch, step.networks.translate
    if batch.outer_source is None or batch.style_reference is None:
        raise ValueError("translating needs outer_source and style_reference, and the batch has none of them.")
    outer, style = batch.outer_source, batch.style_reference
    shrunk = 2 if translates_context(step.cfg) else 1
    if shrunk == 2:
        outer, style = context_images(outer), context_images(style)
    translated = translate(outer, style, step.generator)
    if batch.from_target is not None:
        translated = torch.where(batch.from_target[:, None, None, None], outer, translated)
    return batch.crop_inner(translated, shrunk)


def draw_box(cfg: RunConfig, labels: Tensor, generator: Generator) -> Box | None:
    """HRDA: where this student forward takes its detail from, the same for all images; None without HRDA."""
    if not cfg.hrda.enabled:
        return None
    size = (labels.shape[-2], labels.shape[-1])
    return draw_detail_box(size, cfg.hrda.crop_size, 2 * cfg.model.logits_stride, generator)


def fused_and_detail_loss(
    output: T2SDAOutput, labels: Tensor, cfg: RunConfig, pixel_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the logits; if there is a detail, (1-λ_d) of it and λ_d of the detail's on its box (method 1.5).

    Args:
        output: of the student.
        labels: (B,H,W), or probabilities (B,K,H,W).
        cfg: the run.
        pixel_weights: (B,H,W) or None.
    """
    assert output.logits is not None
    fused = segmentation_loss(output.logits, labels, pixel_weights)
    share, box = cfg.hrda.detail_weight, output.detail_box
    if output.detail_logits is None or box is None or not share:
        return fused
    in_box = None if pixel_weights is None else cut(pixel_weights, box)
    return torch.lerp(fused, segmentation_loss(output.detail_logits, cut(labels, box), in_box), share)

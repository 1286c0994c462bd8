"""T2S-DA: pull target to source. DACS, DAFormer, HRDA and MIC are configs of it: a weight of 0 costs nothing.

Legend: B batch, K classes, D embedding size, H×W image, h×w feature map; s source, t target, st source in target
style (pseudo-target), m mixed, k masked. x images in [0,1], y labels, w pixel weights.

With HRDA (method 5.9) the network itself joins context and detail. What is left of it here: every student forward on a
labelled image draws a detail box, the loss has a detail part, and the pull, the feature distance and the translation
live on the context, at half size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Generator, Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..augment.class_mix import sample_class_mix
from ..augment.color import strong_augment
from ..augment.patch_mask import mask_patches
from ..batch import UdaBatch, normalize
from ..config import RunConfig
from ..labels import IGNORE_INDEX
from ..losses.feature_distance import downscale_labels_by_share, feature_distance
from ..losses.pull import (
    PullSamples,
    class_confidences,
    class_counts,
    class_weights,
    confidence_sums,
    num_queries_per_class,
    prototype_sums,
    pull_loss,
    sample_pull,
    unreliable_pixels,
)
from ..losses.segmentation import segmentation_loss
from ..models import T2SDAOutput
from ..models.image_processing_t2sda import sample_nearest
from ..models.multi_resolution import Box, context_images, cut, draw_detail_box
from ..teacher import make_pseudo_labels, pseudo_label_weights
from .parts import Parts


def t2sda_losses(
    batch: UdaBatch,
    parts: Parts,
    cfg: RunConfig,
    step: int,
    generator: Generator,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Iterator[dict[str, Tensor]]:
    """The T2S-DA objective on one batch (paper section 3): one `yield` per autograd graph, so it can be freed at once.

    Args:
        batch: on the device, images in [0,1].
        parts: networks and translation engine.
        cfg: the run.
        step: index of the running update, from 0.
        generator: of the CPU, for everything drawn here.
        sum_over_processes: sums a tensor of statistics over all processes. A collective: every process calls it the
            same number of times, whatever its batch shows.

    Yields:
        Unweighted losses by name, () float32, and "trust", the weight of the pseudo-labels (for the log).

    Raises:
        ValueError: if the batch lacks target images, or what a translation needs.
    """
    student, teacher = parts.student, parts.teacher
    x_s, y_s, x_t = batch.source_images, batch.source_labels, batch.target_images
    if x_t is None:
        raise ValueError("t2sda adapts to target images, and the batch has none: give a target, or use source_only.")
    weights, aug = cfg.loss_weights, cfg.augment
    pulls = weights.pull > 0 and step >= cfg.pull.start_step

    # The teacher looks at the target first: labels, and keys of it (jointly: of both domains).
    if weights.target or weights.masked_consistency or pulls:
        with torch.no_grad():
            logits_t, keys = look(teacher, x_s, x_t, pulls, cfg.pull.teacher_forward == "joint")
            y_t, confidence = make_pseudo_labels(logits_t, (y_s.shape[-2], y_s.shape[-1]))  # (B,H,W), (B,H,W)
            trust, inside = trust_in(confidence, batch, cfg)
            importance = dynamic_weights(y_t, confidence, inside, parts, cfg, sum_over_processes)  # w*, (K,)
        parts.seen.update(target_images=x_t, teacher_logits=logits_t, pseudo_labels=y_t, confidence=confidence)

    x_st = pseudo_target(batch, parts, cfg, generator) if cfg.translates else x_s
    parts.seen.update(source_images=x_s, pseudo_target_images=x_st)

    # L_source: learn the source, and stay near ImageNet on things.
    if weights.source or weights.feature_distance:
        yield source_terms(x_s if cfg.uda.source_ce_on == "source" else x_st, y_s, parts, cfg, generator)

    # L_target: learn the target from the teacher, on source classes pasted into target images.
    if weights.target:
        from_source = sample_class_mix(y_s, cfg.mix.classes_from, generator)  # (B,H,W) bool
        pasted = x_s if cfg.mix.source == "source" else x_st
        x_m = torch.where(from_source[:, None], pasted, x_t)
        x_m = strong_augment(x_m, aug.jitter_probability, aug.jitter_strength, aug.blur_probability, generator)
        y_m = torch.where(from_source, y_s, y_t)
        # DRW on the target has mean 1 over classes.
        w_t = trust * num_members(cfg) * importance[y_t] if cfg.drw.apply_to == "target" else trust
        w_m = torch.where(from_source, 1.0, w_t)
        mixed = student(normalize(x_m), detail_box=draw_box(cfg, y_m, generator))
        parts.seen.update(mixed_images=x_m, mixed_logits=mixed.logits.detach(), from_source=from_source)
        yield {"target": fused_and_detail_loss(mixed, y_m, cfg, w_m), "trust": w_t.mean()}

    # L_mask (MIC): say the same of the target although patches of it are hidden.
    if weights.masked_consistency:
        x_k = strong_augment(x_t, aug.jitter_probability, aug.jitter_strength, aug.blur_probability, generator)
        x_k = mask_patches(normalize(x_k), cfg.patch_mask.block_size, cfg.patch_mask.ratio, generator)
        masked = student(x_k, detail_box=draw_box(cfg, y_t, generator))
        yield {"masked_consistency": fused_and_detail_loss(masked, y_t, cfg, trust)}

    # L_pull: the same scene in target style must embed like its class does in the source.
    if pulls:
        if "source" not in keys:  # batch norm sees one domain at a time; not before, maps of keys are large
            with torch.no_grad():
                keys["source"] = embed(teacher, x_s, "source", cfg)
        images = {"source": x_s, "ptarget": x_st, "target": x_t}
        yield pull_term(
            images, keys, y_s, y_t, confidence, inside, importance, parts, cfg, generator, sum_over_processes
        )


def source_terms(
    images: Tensor, labels: Tensor, parts: Parts, cfg: RunConfig, generator: Generator
) -> dict[str, Tensor]:
    """L_source of labelled images, and their feature distance; those of weight 0 are left out.

    Args:
        images: (B,3,H,W) in [0,1].
        labels: (B,H,W).
        parts, cfg, generator: of the run and the step.
    """
    weights = cfg.loss_weights
    output = parts.student(
        normalize(images),
        segment=weights.source > 0,
        detail_box=draw_box(cfg, labels, generator) if weights.source else None,
        output_hidden_states=weights.feature_distance > 0,
    )
    terms = {}
    if weights.source:
        parts.seen.update(source_labels=labels, source_logits=output.logits.detach())
        terms["source"] = fused_and_detail_loss(output, labels, cfg)
    if weights.feature_distance and parts.imagenet is not None:
        with torch.no_grad():
            context = context_images(images) if cfg.hrda.enabled else images
            frozen = parts.imagenet(normalize(context)).last_hidden_state
        names = cfg.feature_distance.classes  # () is every pixel; names the run does not have are no pixel
        things = [cfg.classes.index(name) for name in names if name in cfg.classes] if names else None
        terms["feature_distance"] = feature_distance(
            output.hidden_states[-1], frozen, labels, len(cfg.classes), things, cfg.feature_distance.min_ratio
        )
    return terms


def pull_term(
    images: Mapping[str, Tensor],
    keys: Mapping[str, Tensor],
    y_s: Tensor,
    y_t: Tensor | None,
    confidence: Tensor | None,
    inside: Tensor | None,
    importance: Tensor,
    parts: Parts,
    cfg: RunConfig,
    generator: Generator,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """L_pull between the domains that the config names (paper Table 7; method 5.11).

    Args:
        images: (B,3,H,W) by domain: "source", "ptarget" (at half size with HRDA), "target".
        keys: (B,D,h,w) of the teacher by domain: "source", and "target" if there is one.
        y_s: (B,H,W) source labels.
        y_t, confidence, inside: (B,H,W) pseudo-labels, their confidence, and where they may count; None without target.
        importance: (K,) class weights.
        parts, cfg, generator, sum_over_processes: see `t2sda_losses`.
    """
    pull, aug = cfg.pull, cfg.augment
    x_q = images[pull.query_domain]
    if pull.augment:
        x_q = strong_augment(x_q, aug.jitter_probability, aug.jitter_strength, aug.blur_probability, generator)
    with untracked(parts.student, cfg) if pull.query_domain == "ptarget" else nullcontext():
        queries = embed(parts.student, x_q, pull.query_domain, cfg)  # (B,D,h,w)
    if pull.key_domain in keys:
        pulled_to = keys[pull.key_domain]
    else:
        with torch.no_grad():
            pulled_to = embed(parts.teacher, images[pull.key_domain], pull.key_domain, cfg)
    samples, prototypes, importance = pull_against(
        y_s, y_t, confidence, pulled_to, importance, parts, cfg, generator, sum_over_processes, inside
    )
    loss = pull_loss(
        queries,
        keys["source"],
        keys.get("target"),
        prototypes,
        samples,
        importance,
        temperature=pull.temperature,
        objective=pull.objective,
        reduction=pull.reduction,
        num_classes_of_benchmark=num_members(cfg),
    )
    return {"pull": loss}


def embed(network: torch.nn.Module, images: Tensor, domain: str, cfg: RunConfig) -> Tensor:
    """Projector output (B,D,h,w). With HRDA, pseudo-target images may be at half size already (method 5.9)."""
    shrunk = translates_context(cfg) and domain == "ptarget"
    embeddings: Tensor = network(normalize(images), project=True, segment=False, at_context_scale=shrunk).embeddings
    return embeddings


def translates_context(cfg: RunConfig) -> bool:
    """Whether pseudo-target images are at half size: HRDA's context, in which FDA swaps the band of a plain run."""
    return cfg.hrda.enabled and cfg.translates and cfg.translate.hrda_scale == "context"


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
        labels: (B,H,W).
        pixel_weights: (B,H,W) or None.
    """
    assert output.logits is not None
    fused = segmentation_loss(output.logits, labels, pixel_weights)
    share, box = cfg.hrda.detail_weight, output.detail_box
    if output.detail_logits is None or box is None or not share:
        return fused
    in_box = None if pixel_weights is None else cut(pixel_weights, box)
    return (1 - share) * fused + share * segmentation_loss(output.detail_logits, cut(labels, box), in_box)


def trust_in(confidence: Tensor, batch: UdaBatch, cfg: RunConfig) -> tuple[Tensor, Tensor]:
    """Weights of pseudo-labels (method 2.5), and where they may count at all: (B,H,W) in [0,1], and of 0 and 1."""
    uda = cfg.uda
    trust = pseudo_label_weights(confidence, uda.pseudo_threshold, uda.weight_scope, uda.ignore_top, uda.ignore_bottom)
    inside = pseudo_label_weights(confidence, 0.0, "batch", uda.ignore_top, uda.ignore_bottom)
    if batch.target_valid is not None:
        trust, inside = trust * batch.target_valid, inside * batch.target_valid
    return trust, inside


@contextmanager
def untracked(student: torch.nn.Module, cfg: RunConfig) -> Iterator[None]:
    """Pseudo-target images leave the encoder's running statistics alone, if pull.bn_track_ptarget says so."""
    encoder: torch.nn.Module | None = None if cfg.pull.bn_track_ptarget else student.encoder  # type: ignore[assignment]
    norms = [] if encoder is None else [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def look(
    teacher: torch.nn.Module, x_s: Tensor, x_t: Tensor, pulls: bool, joint: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The teacher's target logits (B,K,h,w); for a pull its keys (B,D,h,w) of the target, if joint the source's too."""
    if pulls and joint:
        both = teacher(normalize(torch.cat([x_s, x_t])), project=True)
        keys_s, keys_t = both.embeddings.split([len(x_s), len(x_t)])
        return both.logits[len(x_s) :], {"source": keys_s, "target": keys_t}
    target = teacher(normalize(x_t), project=pulls)
    return target.logits, {"target": target.embeddings} if pulls else {}


def pseudo_target(batch: UdaBatch, parts: Parts, cfg: RunConfig, generator: Generator) -> Tensor:
    """x_st (B,3,H,W): source crops cut out of translated outer windows. HRDA: of half their size (method 5.9)."""
    if batch.outer_source is None or batch.style_reference is None:
        raise ValueError("translating needs outer_source and style_reference, and the batch has none of them.")
    outer, style = batch.outer_source, batch.style_reference
    if translates_context(cfg):
        translated = parts.translate(context_images(outer), context_images(style), generator)
        return batch.crop_inner(translated, shrunk=2)
    return batch.crop_inner(parts.translate(outer, style, generator))


def dynamic_weights(
    y_t: Tensor,
    confidence: Tensor,
    inside: Tensor,
    parts: Parts,
    cfg: RunConfig,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Tensor:
    """w* of DRW (paper eq. 17-18), (K,); 1/C for every class of the benchmark when it is off.

    `inside` is 0 where drw.use_valid_mask leaves pixels out: not the trust, which is 0 everywhere if nothing is sure.
    """
    members = _members(cfg, y_t.device)
    if cfg.drw.apply_to == "none" or not (cfg.loss_weights.pull or cfg.drw.apply_to == "target"):
        return members.float() / members.sum()
    valid = inside > 0 if cfg.drw.use_valid_mask else None
    sums = sum_over_processes(confidence_sums(y_t, confidence, len(cfg.classes), valid))
    confidences = class_confidences(sums, cfg.drw.absent_conf, parts.memory.confidences)
    if cfg.drw.absent_conf == "ema":
        parts.memory.remember_confidences(confidences, sums[1] > 0)
    return class_weights(confidences, members, cfg.drw.beta)


def pull_against(
    y_s: Tensor,
    y_t: Tensor | None,
    confidence: Tensor | None,
    keys: Tensor,
    importance: Tensor,
    parts: Parts,
    cfg: RunConfig,
    generator: Generator,
    sum_over_processes: Callable[[Tensor], Tensor],
    inside: Tensor | None = None,
) -> tuple[PullSamples, Tensor, Tensor]:
    """What the queries are compared with: samples (CBQS, DENPS), prototypes (K,D) and class weights (K,).

    `keys` are those of pull.key_domain. `y_t` and `confidence` are None without a target. Where the target itself is
    pulled, or is what others are pulled to, its pseudo-labels count where `inside` is above 0 and they are sure enough.
    """
    pull, num_classes = cfg.pull, len(cfg.classes)
    small = (keys.shape[-2], keys.shape[-1])
    with torch.no_grad():
        if pull.label_downscale == "nearest":
            y_small = sample_nearest(y_s, small)
        else:
            y_small = downscale_labels_by_share(y_s, small, num_classes, 0.75)
        y_t_small = unreliable = trusted = None
        if y_t is not None and confidence is not None:
            y_t_small = trusted = sample_nearest(y_t, small)
            confidence_small = sample_nearest(confidence, small)
            unreliable = unreliable_pixels(confidence_small, pull.unreliable_ratio, pull.gamma_scope)
            counts_as_label = confidence_small >= pull.target_min_conf
            if inside is not None:
                counts_as_label &= sample_nearest(inside, small) > 0
            trusted = torch.where(counts_as_label, y_t_small, IGNORE_INDEX)
        y_q = trusted if pull.query_domain == "target" and trusted is not None else y_small
        y_k = trusted if pull.key_domain == "target" and trusted is not None else y_small

        asked = sum_over_processes(class_counts(y_q, num_classes))
        counts = asked if y_k is y_q else sum_over_processes(class_counts(y_k, num_classes))
        sums = sum_over_processes(prototype_sums(keys, y_k, num_classes, pull.proto_prenorm))
        prototypes = (sums / counts.clamp(min=1)[:, None]).float()
        if pull.proto_momentum:
            prototypes = parts.memory.remember_prototypes(prototypes, counts > 0, pull.proto_momentum)

        members = _members(cfg, counts.device)
        wanted = num_queries_per_class(
            asked * members, num_members(cfg), pull.num_queries, "cbqs" if pull.query_sampling == "cbqs" else "ceqs"
        )
        if y_q is not y_small or y_k is not y_small:  # a class is pulled only if there is something to pull it to
            has_key = (counts > 0)[y_q.clamp(max=num_classes - 1)] & (y_q != IGNORE_INDEX)
            query_labels = torch.where(has_key, y_q, IGNORE_INDEX)
        else:
            query_labels = None
        samples = sample_pull(
            y_small,
            y_t_small,
            unreliable,
            wanted,
            pull.num_negatives,
            generator,
            uniform_queries=num_members(cfg) * pull.num_queries if pull.query_sampling == "uniform" else None,
            negatives=pull.negatives,
            share=pull.share_negatives,
            ignore_as_negative=pull.ignore_as_negative,
            query_labels=query_labels,
        )
        if cfg.drw.apply_to != "pull":
            importance = members.float() / num_members(cfg)
        if cfg.drw.normalise_over == "queried":
            importance = importance / importance[samples.classes].sum().clamp(min=1e-12)
    return samples, prototypes, importance


def num_members(cfg: RunConfig) -> int:
    """C, the number of classes of the benchmark."""
    return len(cfg.pull.class_set or cfg.classes)


def _members(cfg: RunConfig, device: torch.device) -> Tensor:
    """(K,) bool, the classes of the benchmark."""
    wanted = cfg.pull.class_set or cfg.classes
    return torch.tensor([name in wanted for name in cfg.classes], device=device)

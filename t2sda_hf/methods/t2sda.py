"""T2S-DA: pull target to source. DACS and DAFormer are configs of it, because a weight of 0 costs nothing.

Legend: B batch, K classes, D embedding size, H×W image, h×w feature map; s source, t target, st source in target
style (pseudo-target), m mixed. x images in [0,1], y labels.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from ..augment.class_mix import sample_class_mix
from ..augment.color import strong_augment
from ..batch import UdaBatch, normalize
from ..config import RunConfig
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
    weights, size = cfg.loss_weights, (y_s.shape[-2], y_s.shape[-1])
    pulls = weights.pull > 0 and step >= cfg.pull.start_step

    # The teacher looks first: labels for the target, keys from both domains (batch norm sees one domain at a time).
    with torch.no_grad():
        logits_t, keys = look(teacher, x_s, x_t, pulls, cfg.pull.teacher_forward == "joint")
        y_t, confidence = make_pseudo_labels(logits_t, size)  # (B,H,W), (B,H,W)
        uda = cfg.uda
        trust = pseudo_label_weights(
            confidence, uda.pseudo_threshold, uda.weight_scope, uda.ignore_top, uda.ignore_bottom
        )
        inside = pseudo_label_weights(confidence, 0.0, "batch", uda.ignore_top, uda.ignore_bottom)  # 1, rows left out 0
        importance = dynamic_weights(y_t, confidence, inside, parts, cfg, sum_over_processes)  # w*, (K,)

    # L_source: learn the source, and stay near ImageNet on things.
    if weights.source or weights.feature_distance:
        source = student(normalize(x_s), output_hidden_states=weights.feature_distance > 0)
        terms = {"source": segmentation_loss(source.logits, y_s)}
        if weights.feature_distance and parts.imagenet is not None:
            with torch.no_grad():
                frozen = parts.imagenet(normalize(x_s)).last_hidden_state
            names = cfg.feature_distance.classes  # () is every pixel; names the run does not have are no pixel
            things = [cfg.classes.index(name) for name in names if name in cfg.classes] if names else None
            terms["feature_distance"] = feature_distance(
                source.hidden_states[-1], frozen, y_s, len(cfg.classes), things, cfg.feature_distance.min_ratio
            )
        yield terms

    x_st = pseudo_target(batch, parts, generator) if cfg.translates else x_s

    # L_target: learn the target from the teacher, on source classes pasted into target images.
    if weights.target:
        from_source = sample_class_mix(y_s, cfg.mix.classes_from, generator)  # (B,H,W) bool
        pasted = x_s if cfg.mix.source == "source" else x_st
        x_m = torch.where(from_source[:, None], pasted, x_t)
        aug = cfg.augment
        x_m = strong_augment(x_m, aug.jitter_probability, aug.jitter_strength, aug.blur_probability, generator)
        y_m = torch.where(from_source, y_s, y_t)
        if cfg.drw.apply_to == "target":  # mean 1 over classes
            trust = trust * num_members(cfg) * importance[y_t]
        w_m = torch.where(from_source, 1.0, trust)
        yield {"target": segmentation_loss(student(normalize(x_m)).logits, y_m, w_m), "trust": trust.mean()}

    # L_pull: the same scene in target style must embed like its class does in the source.
    if keys:
        keys_s, keys_t = keys
        if cfg.pull.augment:
            aug = cfg.augment
            x_st = strong_augment(x_st, aug.jitter_probability, aug.jitter_strength, aug.blur_probability, generator)
        queries = student(normalize(x_st), project=True, segment=False).embeddings  # (B,D,h,w)
        samples, prototypes, importance = pull_against(
            y_s, y_t, confidence, keys_s, importance, parts, cfg, generator, sum_over_processes
        )
        yield {
            "pull": pull_loss(
                queries,
                keys_s,
                keys_t,
                prototypes,
                samples,
                importance,
                temperature=cfg.pull.temperature,
                objective=cfg.pull.objective,
                reduction=cfg.pull.reduction,
                num_classes_of_benchmark=num_members(cfg),
            )
        }


def look(
    teacher: torch.nn.Module, x_s: Tensor, x_t: Tensor, pulls: bool, joint: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The teacher's target logits (B,K,h,w), and its keys of source and target (B,D,h,w); no keys without a pull."""
    if not pulls:
        return teacher(normalize(x_t)).logits, None
    if joint:
        both = teacher(normalize(torch.cat([x_s, x_t])), project=True)
        keys_s, keys_t = both.embeddings.split([len(x_s), len(x_t)])
        return both.logits[len(x_s) :], (keys_s, keys_t)
    target = teacher(normalize(x_t), project=True)
    return target.logits, (teacher(normalize(x_s), project=True, segment=False).embeddings, target.embeddings)


def pseudo_target(batch: UdaBatch, parts: Parts, generator: Generator) -> Tensor:
    """x_st (B,3,H,W): the source crops, cut out of translated outer windows."""
    if batch.outer_source is None or batch.style_reference is None:
        raise ValueError("translating needs outer_source and style_reference, and the batch has none of them.")
    return batch.crop_inner(parts.translate(batch.outer_source, batch.style_reference, generator))


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
    y_t: Tensor,
    confidence: Tensor,
    keys_s: Tensor,
    importance: Tensor,
    parts: Parts,
    cfg: RunConfig,
    generator: Generator,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> tuple[PullSamples, Tensor, Tensor]:
    """What the queries are compared with: samples (CBQS, DENPS), prototypes (K,D) and class weights (K,)."""
    pull, num_classes = cfg.pull, len(cfg.classes)
    small = (keys_s.shape[-2], keys_s.shape[-1])
    with torch.no_grad():
        if pull.label_downscale == "nearest":
            y_small = _nearest(y_s, small)
        else:
            y_small = downscale_labels_by_share(y_s, small, num_classes, 0.75)
        y_t_small, confidence_small = _nearest(y_t, small), _nearest(confidence, small)

        counts = sum_over_processes(class_counts(y_small, num_classes))
        sums = sum_over_processes(prototype_sums(keys_s, y_small, num_classes, pull.proto_prenorm))
        prototypes = (sums / counts.clamp(min=1)[:, None]).float()
        if pull.proto_momentum:
            prototypes = parts.memory.remember_prototypes(prototypes, counts > 0, pull.proto_momentum)

        members = _members(cfg, counts.device)
        wanted = num_queries_per_class(
            counts * members, num_members(cfg), pull.num_queries, "cbqs" if pull.query_sampling == "cbqs" else "ceqs"
        )
        samples = sample_pull(
            y_small,
            y_t_small,
            unreliable_pixels(confidence_small, pull.unreliable_ratio, pull.gamma_scope),
            wanted,
            pull.num_negatives,
            generator,
            uniform_queries=num_members(cfg) * pull.num_queries if pull.query_sampling == "uniform" else None,
            negatives=pull.negatives,
            share=pull.share_negatives,
            ignore_as_negative=pull.ignore_as_negative,
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


def _nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Row ⌊i·H/h⌋, column ⌊j·W/w⌋ of (B,H,W) -> (B,h,w), PyTorch's "nearest", for any dtype."""
    rows = torch.arange(size[0], device=maps.device) * maps.shape[-2] // size[0]
    columns = torch.arange(size[1], device=maps.device) * maps.shape[-1] // size[1]
    return maps[:, rows[:, None], columns]

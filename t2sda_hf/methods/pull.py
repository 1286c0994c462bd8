"""L_pull: what is pulled, and to what (paper section 3.2-3.4; method 5).

Legend: B batch, K classes, D embedding size, H×W image, h×w feature map; s source, t target, q queries, k keys. x
images in [0,1], y labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..augment.color import StrongAugmentation, strong_augment
from ..config import RunConfig
from ..device import constant
from ..labels import IGNORE_INDEX
from ..losses.feature_distance import downscale_labels_by_share
from ..losses.pull import (
    PullSamples,
    SortedPixels,
    class_counts,
    num_queries_per_class,
    prototype_sums,
    pull_loss,
    sample_pull,
    sort_by_class,
    unreliable_pixels,
)
from ..models.image_processing_t2sda import sample_nearest
from .pseudo_labels import PseudoLabels, equal_weights
from .step import Graph, Step


def pull_graph(
    step: Step,
    images: Mapping[str, Tensor],
    keys: Mapping[str, Tensor],
    pseudo_labels: PseudoLabels | None,
    seen: Mapping[str, Any],
) -> Graph:
    """L_pull between the domains that the config names (paper Table 7; method 5.11).

    Args:
        step: see `Step`.
        images: (B,3,H,W) by domain: "source", "ptarget" (at half size with HRDA), and "target" if there is one.
        keys: (B,D,h,w) of the teacher by domain, as far as they are made already.
        pseudo_labels: of the target; None without one.
        seen: what the objective has looked at already.
    """
    cfg, pull, student, teacher = step.cfg, step.cfg.pull, step.networks.student, step.networks.teacher
    keys = dict(keys)
    with torch.no_grad():  # one domain at a time, for batch norm; not earlier, because maps of keys are large
        for domain in ("source", pull.key_domain):
            if domain not in keys:
                keys[domain] = embed(step, teacher, images[domain], domain)
    x_q = augmented(step, images[pull.query_domain]) if pull.augment else images[pull.query_domain]
    with untracked(student, cfg) if pull.query_domain == "ptarget" else nullcontext():
        queries = embed(step, student, x_q, pull.query_domain)  # (B,D,h,w)
    samples, prototypes, importance = pull_against(step, keys[pull.key_domain], pseudo_labels)
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
        num_classes_of_benchmark=step.num_members,
    )
    compared = {"samples": samples, "prototypes": prototypes, "class_weights": importance}
    return Graph({"pull": loss}, {**seen, **compared})


@torch.no_grad()
def pull_against(step: Step, keys: Tensor, pseudo_labels: PseudoLabels | None) -> tuple[PullSamples, Tensor, Tensor]:
    """What the queries are compared with: samples (CBQS, DENPS), prototypes (K,D) and class weights (K,).

    `keys` (B,D,h,w) are those of pull.key_domain.
    """
    cfg, pull, num_classes = step.cfg, step.cfg.pull, len(step.cfg.classes)
    labels = small_labels(step, pseudo_labels, (keys.shape[-2], keys.shape[-1]))
    pixels = sort_by_class(labels.maps, num_classes, step.device_generator)
    asked = step.sum_over_processes(pixels.counts[0 if labels.queries is labels.source else -1, :-1])
    same = labels.keys is labels.queries
    counts = asked if same else step.sum_over_processes(class_counts(labels.keys, num_classes))
    sums = step.sum_over_processes(prototype_sums(keys, labels.keys, num_classes, pull.proto_prenorm))
    prototypes = (sums / counts.clamp(min=1)[:, None]).float()
    if pull.proto_momentum:
        prototypes = step.memory.remember_prototypes(prototypes, counts > 0, pull.proto_momentum)

    samples = draw_samples(step, labels, pixels, asked, counts)
    weighed = pseudo_labels if cfg.drw.apply_to == "pull" else None
    importance = equal_weights(step) if weighed is None else weighed.class_weights
    if cfg.drw.normalise_over == "queried":
        importance = importance / (importance * (samples.num_queries > 0)).sum().clamp(min=1e-12)
    return samples, prototypes, importance


@dataclass(frozen=True)
class SmallLabels:
    """Labels at the size of the embeddings, (B,h,w) int64, 255 where a pixel has none.

    Attributes:
        maps: (S,B,h,w), for `sort_by_class`, in the order that `sample_pull` expects: the source's, pseudo-labels of
            unreliable target pixels, if there is a target, and `queries`, if they are not the source's.
        source: of the source, and so of its translation.
        queries, keys: of the domain that is pulled, and of the one it is pulled to. The same tensor as `source` if it
            is one of these two, but that labelled images of the target make no prototypes unless pull.prototypes says
            so. Pseudo-labels are in them only where they may count and are sure enough.
        has_target: whether there is a target.
    """

    maps: Tensor
    source: Tensor
    queries: Tensor
    keys: Tensor
    has_target: bool


def small_labels(step: Step, pseudo_labels: PseudoLabels | None, size: tuple[int, int]) -> SmallLabels:
    """The labels of source and target at `size` (h,w)."""
    pull, y_s = step.cfg.pull, step.batch.source_labels
    if pull.label_downscale == "nearest":
        y_s = sample_nearest(y_s, size)
    else:
        y_s = downscale_labels_by_share(y_s, size, len(step.cfg.classes), 0.75)
    of_target, y_k = step.batch.from_target, y_s
    if of_target is not None and pull.prototypes == "source":
        y_k = torch.where(of_target[:, None, None], IGNORE_INDEX, y_s)
    if pseudo_labels is None:
        return _together(y_s, y_s, y_k)
    y_t = sample_nearest(pseudo_labels.labels, size)
    confidence = sample_nearest(pseudo_labels.confidence, size)
    unreliable = unreliable_pixels(confidence, pull.unreliable_ratio, pull.gamma_scope)
    nowhere = constant((IGNORE_INDEX,), y_t.device, y_t.dtype)
    negatives = torch.where(unreliable, y_t, nowhere)
    if "target" not in (pull.query_domain, pull.key_domain):
        return _together(y_s, y_s, y_k, negatives)
    counts = (confidence >= pull.target_min_conf) & (sample_nearest(pseudo_labels.inside, size) > 0)
    trusted = torch.where(counts, y_t, nowhere)
    queries = trusted if pull.query_domain == "target" else y_s
    return _together(y_s, queries, trusted if pull.key_domain == "target" else y_k, negatives)


def _together(source: Tensor, queries: Tensor, keys: Tensor, negatives: Tensor | None = None) -> SmallLabels:
    """Maps (B,h,w), `negatives` those of unreliable target pixels. What is one tensor here stays one."""
    listed = [source, *([] if negatives is None else [negatives]), *([] if queries is source else [queries])]
    maps = torch.stack(listed)
    views = {id(own): view for own, view in zip(listed, maps, strict=True)}
    source, queries, keys = (views.get(id(own), own) for own in (source, queries, keys))
    return SmallLabels(maps, source, queries, keys, negatives is not None)


def draw_samples(step: Step, labels: SmallLabels, pixels: SortedPixels, asked: Tensor, counts: Tensor) -> PullSamples:
    """Queries and negatives.

    Args:
        pixels: of `labels.maps`.
        asked, counts: (K,) pixels per class over all processes, in `labels.queries` and in `labels.keys`.
    """
    pull = step.cfg.pull
    sampling: Literal["cbqs", "ceqs"] = "ceqs" if pull.query_sampling == "ceqs" else "cbqs"
    inside = asked * step.members if pull.class_set else asked
    wanted = num_queries_per_class(inside, step.num_members, pull.num_queries, sampling)
    if labels.keys is not labels.queries:  # a class is pulled only if there is something to pull it to
        wanted = wanted * (counts > 0)
    most = pull.num_queries * (len(asked) if sampling == "ceqs" else step.num_members)
    return sample_pull(
        pixels,
        wanted,
        most + (len(asked) if pull.query_sampling == "cbqs" else 0),  # CBQS rounds up
        pull.num_negatives,
        step.device_generator,
        has_target=labels.has_target,
        uniform=pull.query_sampling == "uniform",
        negatives=pull.negatives,
        share=pull.share_negatives,
        ignore_as_negative=pull.ignore_as_negative,
    )


def embed(step: Step, network: nn.Module, images: Tensor, domain: str) -> Tensor:
    """Projector output (B,D,h,w); source-free what the classifier reads. With HRDA, pseudo-target images may be at half
    size already (method 5.9)."""
    if step.cfg.method == "source_free":
        output = network(step.normalized(images), segment=False, output_hidden_states=True)
        return before_classifier(network, output.hidden_states)
    shrunk, pixels = translates_context(step.cfg) and domain == "ptarget", step.normalized(images)
    embeddings: Tensor = network(pixels, project=True, segment=False, at_context_scale=shrunk).embeddings
    return embeddings


def before_classifier(network: Any, hidden_states: Sequence[Tensor]) -> Tensor:
    """(B,E,h,w), what the head makes of the encoder's maps and its classifier reads."""
    features: Tensor = network.decode_head.penultimate(hidden_states)
    return features


def translates_context(cfg: RunConfig) -> bool:
    """Whether pseudo-target images are at half size: HRDA's context, in which FDA swaps the band of a plain run."""
    return cfg.hrda.enabled and cfg.translates and cfg.translate.hrda_scale == "context"


@contextmanager
def untracked(student: nn.Module, cfg: RunConfig) -> Iterator[None]:
    """Pseudo-target images leave the encoder's running statistics alone, if pull.bn_track_ptarget says so."""
    encoder: nn.Module | None = None if cfg.pull.bn_track_ptarget else student.encoder  # type: ignore[assignment]
    norms = [] if encoder is None else [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def augmented(step: Step, images: Tensor) -> Tensor:
    """Images (B,3,H,W) in colours of the strong augmentation."""
    return strong_augment([images], [draw_augmentation(step, images)])[0]


def draw_augmentation(step: Step, images: Tensor) -> StrongAugmentation:
    """Colours of the strong augmentation for images (B,3,H,W)."""
    aug = step.cfg.augment
    how = (aug.jitter_probability, aug.jitter_strength, aug.blur_probability)
    return StrongAugmentation.draw(len(images), *how, step.generator)

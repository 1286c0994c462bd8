"""Measure speed and memory of the central parts, beside others: python scripts/benchmark.py [--rounds 7] [--rows pull]

One thread, process CPU time, variants interleaved in one process after one round to warm up; medians, and medians of
the ratios within a round, stand beside their goals. Inputs are random and nothing is downloaded, but for the `mean_iou`
of the evaluate library, which is on the Hub (--mean-iou takes a copy of that folder).

--peer-path DIR adds the rows against a checkout of DAFormer (github.com/lhoyer/DAFormer), which must be importable:
mmcv, timm, kornia 0.5.8 and prettytable beside this package. A row whose other side is missing says so.
"""

import argparse
import ctypes
import importlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, SegformerConfig, SegformerForSemanticSegmentation
from transformers.modeling_outputs import BackboneOutput

from t2sda_hf.batch import UdaBatch, normalize
from t2sda_hf.config import DataConfig, DomainConfig, LossWeights, ModelConfig, RunConfig, TrainConfig, UdaConfig
from t2sda_hf.data.domains import load_domain
from t2sda_hf.data.pairs import PairDataset, batches
from t2sda_hf.data.preparing import prepare
from t2sda_hf.data.streets import streets
from t2sda_hf.evaluation.confusion import confusion_matrix, scores
from t2sda_hf.evaluation.inference import predict_labels
from t2sda_hf.hub.card import cpu_name
from t2sda_hf.losses.pull import num_queries_per_class, pull_loss, sample_pull, sort_by_class
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.masking import run_masked
from t2sda_hf.methods import METHODS, Graph, Method, Networks, Step
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation
from t2sda_hf.teacher import make_teacher, update_teacher
from t2sda_hf.training import loop
from t2sda_hf.training.build import build_student
from t2sda_hf.training.checkpoint import Progress
from t2sda_hf.training.derive import without_data
from t2sda_hf.training.loop import Run, update
from t2sda_hf.training.parts import make_parts
from t2sda_hf.training.tracking import Tracker
from t2sda_hf.translate import build_engine
from t2sda_hf.translate.fda import low_amplitude, with_low_amplitude

MISSING = "not installed"


@dataclass(frozen=True)
class Options:
    """What is measured, and where others are found."""

    rounds: int
    mean_iou: str
    peer: Path | None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    measured: str
    goal: str

    @classmethod
    def ratio(cls, what: str, ours: Sequence[float], others: Sequence[float], goal: str, scale: float = 1) -> "Row":
        """Median of the ratios of a round, divided by `scale`, and both medians in ms."""
        value = statistics.median(a / b for a, b in zip(ours, others, strict=True)) / scale
        ms = " / ".join(f"{1000 * statistics.median(times):.3g}" for times in (ours, others))
        return cls(f"{what} ({ms} ms)", f"{value:.2f}" if value >= 0.1 else f"1/{1 / value:.0f}", goal)


def interleaved(variants: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """CPU seconds of every variant in every round, after one round to warm up; the order turns with the rounds."""
    times: list[list[float]] = [[] for _ in variants]
    for turn in range(-1, rounds):
        order = range(len(variants)) if turn % 2 else reversed(range(len(variants)))
        for index in order:
            began = time.process_time()
            variants[index]()
            if turn >= 0:
                times[index].append(time.process_time() - began)
    return times


def extra_memory(function: Callable[[], object]) -> float:
    """Largest resident memory of this process during the call above that before it, in MB; Linux keeps the mark."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # lowers it to what is resident now, see proc(5)
    before = _resident_mark()
    function()
    return _resident_mark() - before


def _resident_mark() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e6


def in_new_process(name: str, *arguments: str, processes: int = 1) -> Any:
    """What `--measure name` prints in one or two processes of their own: nothing is left over from other rows."""
    own = [os.fspath(Path(__file__).resolve()), "--measure", name, *arguments]
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    # "multi_gpu" is accelerate's word for several processes, on a CPU too; --cpu would start one.
    launch += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = [sys.executable, *launch, *own]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if name == "memory":  # what is in use, as on a GPU: glibc would keep a third of what was freed
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def street_labels(num: int, height: int, width: int, num_classes: int) -> torch.Tensor:
    """(num,H,W) int64 blocky maps in which class c is about 1/(c+1) as frequent as class 0."""
    random = torch.Generator().manual_seed(1)
    frequencies = 1 / torch.arange(1, num_classes + 1)
    cells = torch.multinomial(frequencies, num * (height // 16) * (width // 16), replacement=True, generator=random)
    cells = cells.view(num, height // 16, width // 16)
    return cells.repeat_interleave(16, 1).repeat_interleave(16, 2)


def small_run(size: str = "mit_b0", head: str = "all_mlp", side: int = 256, **train: Any) -> RunConfig:
    """T2S-DA on square crops, from random weights, so without the distance to ImageNet."""
    cfg = RunConfig(
        model=ModelConfig(size=size, pretrained=None, head=head),  # type: ignore[arg-type]
        data=DataConfig(crop_size=(side, side), outer_crop_size=(side, 2 * side)),
        uda=UdaConfig(ignore_top=0, ignore_bottom=0),
        loss_weights=LossWeights(feature_distance=0),
        train=TrainConfig(log_with=(), **train),
    )
    return without_data(cfg)


def without_pull(cfg: RunConfig) -> RunConfig:
    """DACS."""
    return replace(cfg, loss_weights=replace(cfg.loss_weights, pull=0))


def random_batch(cfg: RunConfig) -> UdaBatch:
    height, width = cfg.data.crop_size
    random, num = torch.Generator().manual_seed(0), cfg.train.batch_size

    def images(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(0, 256, (num, 3, rows, columns), dtype=torch.uint8, generator=random)

    return UdaBatch(
        source_images=images(height, width),
        source_labels=street_labels(num, height, width, len(cfg.classes)).byte(),
        target_images=images(height, width),
        outer_source=images(*cfg.data.outer_crop_size),
        style_reference=images(*cfg.data.outer_crop_size),
        inner_corner=torch.zeros(num, 2, dtype=torch.int64),
    )


def make_step(
    cfg: RunConfig,
    accelerator: Accelerator,
    method: Method | None = None,
    given: Iterator[UdaBatch] | None = None,
    change: Callable[[Networks], None] = lambda _: None,
) -> Callable[[], object]:
    """One update of the real loop, on one batch that is there already or on those `given`, of networks changed so."""
    batch = random_batch(cfg)
    parts = make_parts(cfg, build_student(cfg).train(), build_engine(cfg.translate), accelerator)
    change(parts.networks)
    run = Run(cfg, accelerator, parts, method or METHODS[cfg.method], given or itertools.repeat(batch))
    steps = iter(range(cfg.train.max_steps))
    tracker = Tracker(accelerator, Path(tempfile.mkdtemp()), cfg.train.max_steps, Progress(), cfg.method, show=False)
    return lambda: update(run, next(steps), tracker)


def supervised_rows(options: Options) -> Iterator[Row]:
    """Forward and backward of two labelled images."""
    for side, goal in ((128, "0.60"), (256, "0.52")):
        config = T2SDAConfig.from_size("mit_b0", head="all_mlp", num_labels=19)
        ours = T2SDAForSemanticSegmentation(config).train()
        theirs = SegformerForSemanticSegmentation(
            SegformerConfig(depths=config.depths, hidden_sizes=config.hidden_sizes, num_labels=19)
        ).train()
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        labels = street_labels(2, side, side, 19)

        def our_pass(ours: Any = ours, images: torch.Tensor = images, labels: torch.Tensor = labels) -> None:
            ours.zero_grad()
            segmentation_loss(ours(images).logits, labels).backward()

        def their_pass(theirs: Any = theirs, images: torch.Tensor = images, labels: torch.Tensor = labels) -> None:
            theirs.zero_grad()
            theirs(images, labels=labels).loss.backward()

        times = interleaved([our_pass, their_pass], options.rounds)
        yield Row.ratio(f"supervised forward + backward over transformers' SegFormer, B0, {side} px", *times, goal)


def ideal_ratio(cfg: RunConfig) -> tuple[float, float]:
    """FLOPs of a T2S-DA step over those of a supervised and over those of a DACS step, on as many labelled images.

    E, S and P are forwards of encoder, head and projector, and a backward is two: 11E+7S+5P, 3E+3S and 7E+7S.
    """
    model = build_student(cfg).eval()
    model.set_attn_implementation("eager")  # the counter does not see the fused attention of a CPU
    pixels, counts = torch.zeros(1, 3, *cfg.data.crop_size), {}
    for name, options in (("E", {"segment": False}), ("S", {}), ("P", {"segment": False, "project": True})):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(pixels, **options)
        counts[name] = counter.get_total_flops()
    e, s, p = counts["E"], counts["S"] - counts["E"], counts["P"] - counts["E"]
    step = 11 * e + 7 * s + 5 * p
    return step / (3 * e + 3 * s), step / (7 * e + 7 * s)


def step_rows(options: Options) -> Iterator[Row]:
    """Whole steps, MiT-B0, 256 px, 2 source and 2 target images."""
    cfg, accelerator = small_run(), Accelerator(cpu=True)
    variants = [make_step(one, accelerator) for one in (cfg, without_pull(cfg), replace(cfg, method="source_only"))]
    if options.peer is not None:
        variants.append(dacs_of_daformer(cfg))
    t2sda, dacs, supervised, *peer = interleaved(variants, options.rounds)
    over_supervised, over_dacs = ideal_ratio(cfg)
    title = "T2S-DA step over own {} step, B0, 256 px, 2+2 images, divided by the FLOP ideal {:.2f}"
    yield Row.ratio(title.format("supervised", over_supervised), t2sda, supervised, "1.0", over_supervised)
    yield Row.ratio(title.format("DACS", over_dacs), t2sda, dacs, "-", over_dacs)
    for name, ours, goal in (("DACS", dacs, "0.45"), ("T2S-DA", t2sda, "0.75")):
        if peer:
            yield Row.ratio(f"our {name} step over DAFormer's DACS step, same encoder and head", ours, *peer, goal)
        else:
            yield Row(
                f"our {name} step over DAFormer's DACS step ({1000 * statistics.median(ours):.0f} ms)",
                "--peer-path",
                goal,
            )


def encoders_rows(options: Options) -> Iterator[Row]:
    """A step on a plain ViT over what transformers' own code takes for as many images, and the step without it."""
    accelerator, images = Accelerator(cpu=True), torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    seen = {True: 0, False: 0}  # images of a step, whether they are learned from

    def without_encoder(networks: Networks) -> None:
        for network in (networks.student, networks.teacher):
            encoder: Any = network.pretrained_encoder
            with torch.no_grad():
                shapes = [one.shape[1:] for one in encoder(images).feature_maps]

            def forward(pixel_values: torch.Tensor, shapes: Sequence[torch.Size] = shapes) -> BackboneOutput:
                learns = torch.is_grad_enabled()
                seen[learns] += len(pixel_values)
                maps: Any = tuple(torch.ones(len(pixel_values), *shape, requires_grad=learns) for shape in shapes)
                return BackboneOutput(feature_maps=maps)

            encoder.forward = forward

    with tempfile.TemporaryDirectory() as folder:
        Dinov2Config(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=6, patch_size=16, image_size=256
        ).save_pretrained(folder)
        model = ModelConfig(size="auto", pretrained=folder, random_start=True, head="all_mlp", drop_path_rate=0)
        cfg = replace(small_run(), model=model)
        step, around = make_step(cfg, accelerator), make_step(cfg, accelerator, change=without_encoder)
        encoder: Any = build_student(cfg).train().pretrained_encoder

    def learn() -> None:
        encoder.zero_grad()
        maps = encoder(images).feature_maps
        torch.autograd.backward(maps, [torch.ones_like(one) for one in maps])

    @torch.no_grad()
    def look() -> None:
        encoder(images)

    around()
    learned, looked = seen[True] / len(images), seen[False] / len(images)
    own, rest, learning, looking = interleaved([step, around, learn, look], options.rounds)
    parts = [c + learned * a + looked * b for a, b, c in zip(learning, looking, rest, strict=True)]
    title = (
        f"T2S-DA step on a ViT of 384 channels and 6 blocks, 256 px, 2+2 images, over its {learned + looked:g} passes"
    )
    yield Row.ratio(f"{title} alone, {learned:g} with backward, and all around them", own, parts, "1.10")


def dacs_of_daformer(cfg: RunConfig) -> Callable[[], object]:
    """A step of DAFormer's own DACS class on its MiT-B0 and its SegFormer head, with PyTorch's default AdamW."""
    dacs = importlib.import_module("mmseg.models.uda.dacs").DACS
    norm = {"type": "BN", "requires_grad": True}
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    model = {
        "type": "EncoderDecoder",
        "backbone": {"type": "mit_b0", "style": "pytorch"},
        "decode_head": {
            "type": "SegFormerHead",
            "in_channels": [32, 64, 160, 256],
            "in_index": [0, 1, 2, 3],
            "channels": 256,
            "dropout_ratio": 0.1,
            "num_classes": len(cfg.classes),
            "norm_cfg": norm,
            "align_corners": False,
            "decoder_params": {"embed_dim": 256, "conv_kernel_size": 1},
            "loss_decode": loss,
        },
        "train_cfg": {"work_dir": tempfile.mkdtemp()},
        "test_cfg": {"mode": "whole"},
    }
    network = dacs(
        model=model,
        max_iters=cfg.train.max_steps,
        alpha=0.999,
        pseudo_threshold=0.968,
        pseudo_weight_ignore_top=0,
        pseudo_weight_ignore_bottom=0,
        imnet_feature_dist_lambda=0,
        imnet_feature_dist_classes=None,
        imnet_feature_dist_scale_min_ratio=None,
        mix="class",
        blur=True,
        color_jitter_strength=0.2,
        color_jitter_probability=0.2,
        debug_img_interval=10**9,
        print_grad_magnitude=False,
    ).train()
    network._init_ema_weights()
    network.local_iter = 1  # the first iteration also draws a picture
    optimizer = torch.optim.AdamW(network.get_model().parameters(), lr=6e-5, weight_decay=0.01)
    batch = random_batch(cfg).on(torch.device("cpu"))
    assert batch.target_images is not None
    scale = {"mean": np.float32([123.675, 116.28, 103.53]), "std": np.float32([58.395, 57.12, 57.375])}
    metas = [{"img_norm_cfg": scale, "ori_shape": (*cfg.data.crop_size, 3), "flip": False}] * len(batch.source_images)
    given = {
        "img": normalize(batch.source_images),
        "img_metas": metas,
        "gt_semantic_seg": batch.source_labels[:, None],
        "target_img": normalize(batch.target_images),
        "target_img_metas": metas,
    }
    return lambda: network.train_step(given, optimizer)


QUERIES, NEGATIVES, DIM, SIDE = 128, 1024, 256, 128  # of the pull loss: n, m, D, and the side of its maps


def pull_pass() -> tuple[Callable[[], None], int]:
    """Pull loss with its sampling, forward and backward, on two source and two target maps; the number of queries."""
    num_classes, dim, side = 19, DIM, SIDE
    random = torch.Generator().manual_seed(0)
    labels = street_labels(2, side, side, num_classes)
    queries, source, target = (
        torch.randn(2, dim, side, side, generator=random).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    queries.requires_grad_(True)
    counts = labels.flatten().bincount(minlength=num_classes)
    wanted = num_queries_per_class(counts.double(), num_classes, QUERIES, "cbqs")
    prototypes, weights = torch.randn(num_classes, dim, generator=random), torch.full((num_classes,), 1 / num_classes)
    unreliable = torch.rand(2, side, side, generator=random) < 0.5

    def forward_backward() -> None:
        maps = torch.stack([labels, torch.where(unreliable, labels.flip(0), 255)])
        pixels = sort_by_class(maps, num_classes, random)
        samples = sample_pull(pixels, wanted, (QUERIES + 1) * num_classes, NEGATIVES, random)
        loss = pull_loss(queries, source, target, prototypes, samples, weights, temperature=0.2)
        queries.grad = None
        loss.backward()

    return forward_backward, int(wanted.sum())


def pull_rows(options: Options) -> Iterator[Row]:
    forward_backward, num_queries = pull_pass()
    rows, features = torch.randn(num_queries, DIM), torch.randn(NEGATIVES, DIM)

    def two_products() -> None:
        _ = (rows @ features.T) @ features

    def gradient_of_zeros() -> None:  # what autograd hands back is as large as the maps
        torch.zeros(2, SIDE, SIDE, DIM)

    times, floor, zeros = interleaved([forward_backward, two_products, gradient_of_zeros], options.rounds)
    title = f"pull loss forward + backward (n={QUERIES}, m={NEGATIVES}, d={DIM}, {num_queries} queries)"
    yield Row.ratio(f"{title} over its two matrix products", times, floor, "2.5")
    both = [a + b for a, b in zip(floor, zeros, strict=True)]
    yield Row.ratio("the same over the two products and the zeros of the dense gradient", times, both, "-")
    yield Row(f"{title}: extra memory, MB", f"{in_new_process('memory', 'pull'):.0f}", "50")


def fda_rows(options: Options) -> Iterator[Row]:
    """Translation of one 512x1024 image whose target's amplitude is kept."""
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, 512, 1024, generator=random)
    source, target = (F.avg_pool2d(noise, 9, 1, 4) + 0.2 * noise).split(1)  # smooth, with detail
    for side in (5, 25, 46):
        beta = (side + 0.5) / 512
        kept = low_amplitude(target, beta)
        assert kept.shape[-1] == side + 1

        def ours(kept: torch.Tensor = kept) -> torch.Tensor:
            return with_low_amplitude(source, kept)

        def published(side: int = side) -> np.ndarray:
            """FDA_source_to_target_np's steps: both transforms, shift, swap the block, shift back, inverse."""
            spectra = [np.fft.fft2(image[0].numpy(), axes=(-2, -1)) for image in (source, target)]
            (amplitude, other), phase = [np.fft.fftshift(np.abs(one), axes=(-2, -1)) for one in spectra], None
            phase = np.angle(spectra[0])
            block = (slice(None), slice(256 - side, 256 + side + 1), slice(512 - side, 512 + side + 1))
            amplitude[block] = other[block]
            amplitude = np.fft.ifftshift(amplitude, axes=(-2, -1))
            return np.real(np.fft.ifft2(amplitude * np.exp(1j * phase), axes=(-2, -1)))

        def real_transforms(side: int = side) -> torch.Tensor:
            spectrum, other = (torch.fft.rfft2(image) for image in (source, target))
            for rows in (slice(0, side + 1), slice(512 - side, 512)):
                block = (slice(None), slice(None), rows, slice(0, side + 1))
                spectrum[block] = torch.polar(other[block].abs(), spectrum[block].angle())
            return torch.fft.irfft2(spectrum, s=(512, 1024))

        times = interleaved([ours, published, real_transforms], options.rounds)
        error = 255 * np.abs(ours()[0].numpy() - published()).max()
        title = f"FDA 512x1024, b={side}, kept amplitude, over"
        yield Row.ratio(f"{title} the published numpy formula", times[0], times[1], "1/50" if side == 5 else "-")
        yield Row.ratio(f"{title} two real transforms", times[0], times[2], "1/4" if side == 5 else "-")
        yield Row(f"FDA, b={side}: largest difference to the numpy formula, on 0..255", f"{error:.1e}", "1e-3")


def two_maps() -> tuple[np.ndarray, np.ndarray]:
    """(1,1024,2048) uint8: predictions and labels of a drawn street."""
    labels = np.array(streets("target", "validation", 1, height=1024, width=2048)[0]["label"])[None]
    predictions = np.roll(labels, (3, 5), (1, 2))  # wrong along the borders of things
    labels[:, :40] = 255
    return predictions, labels


def metric_rows(options: Options) -> Iterator[Row]:
    """mIoU of one 1024x2048 map of 19 classes."""
    predictions, labels = two_maps()
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = scores(confusion_matrix(predictions, labels, 19))["mean_iou"]

    others: dict[str, tuple[str, Callable[[], object] | str]] = {}
    try:
        metric = importlib.import_module("evaluate").load(options.mean_iou)

        def theirs() -> None:
            result = metric.compute(predictions=predictions, references=labels, num_labels=19, ignore_index=255)
            found["evaluate"] = result["mean_iou"]

        others["evaluate's mean_iou"] = ("1/60", theirs)
    except (OSError, ConnectionError) as error:
        others["evaluate's mean_iou"] = ("1/60", f"not reached ({type(error).__name__}); --mean-iou")
    try:
        jaccard = importlib.import_module("torchmetrics.functional.classification").multiclass_jaccard_index
        tensors = torch.from_numpy(predictions.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))

        def torch_metric() -> None:
            found["torchmetrics"] = float(jaccard(*tensors, 19, average="macro", ignore_index=255, validate_args=False))

        others["torchmetrics' jaccard index, unchecked"] = ("1/8", torch_metric)
    except ImportError:
        others["torchmetrics' jaccard index, unchecked"] = ("1/8", MISSING)
    if options.peer is not None:
        areas = importlib.import_module("mmseg.core.evaluation.metrics").intersect_and_union

        def peer() -> None:
            intersection, union, *_ = areas(predictions, labels, 19, 255)
            found["DAFormer"] = float((intersection / union).mean())

        others["DAFormer's intersect_and_union"] = ("-", peer)
    else:
        others["DAFormer's intersect_and_union"] = ("-", "--peer-path")
    runnable = [function for _, function in others.values() if callable(function)]
    times = interleaved([ours, *runnable], options.rounds)
    if max(abs(value - found["ours"]) for value in found.values()) > 1e-5:
        raise AssertionError(f"the metrics disagree: {found}")
    measured = iter(times[1:])
    for name, (goal, function) in others.items():
        title = f"mIoU of a 1024x2048 map over {name}"
        yield Row.ratio(title, times[0], next(measured), goal) if callable(function) else Row(title, function, goal)
    yield Row("mIoU of a 1024x2048 map: extra memory, MB", f"{in_new_process('memory', 'metric'):.1f}", "5")


def label_makers() -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], Any, torch.Tensor]:
    """Labels of one 1024x2048 image, MiT-B0, 19 classes: ours, transformers'; our model; its pixels."""
    config = T2SDAConfig.from_size("mit_b0", head="all_mlp", num_labels=19)
    theirs = SegformerForSemanticSegmentation(
        SegformerConfig(depths=config.depths, hidden_sizes=config.hidden_sizes, num_labels=19)
    ).eval()
    with tempfile.TemporaryDirectory() as folder:  # the same weights
        theirs.save_pretrained(folder)
        ours = T2SDAForSemanticSegmentation.from_pretrained(folder).eval()
    pixels = torch.randn(1, 3, 1024, 2048, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def full() -> torch.Tensor:
        logits = theirs(pixels).logits
        return F.interpolate(logits, size=(1024, 2048), mode="bilinear", align_corners=False).argmax(1)

    def class_by_class() -> torch.Tensor:
        return predict_labels(ours, pixels, (1024, 2048))

    return class_by_class, full, ours, pixels


def inference_rows(options: Options) -> Iterator[Row]:
    class_by_class, full, ours, pixels = label_makers()

    @torch.no_grad()
    def encoder() -> None:  # transformers' own, in both
        ours.encoder(pixels, output_hidden_states=True)

    own, others, floor = interleaved([class_by_class, full, encoder], options.rounds)
    yield Row.ratio("labels of 1024x2048, B0, over transformers' SegFormer and full upsampling", own, others, "0.45")
    yield Row.ratio("the same: the encoder alone, which both run, over transformers' whole", floor, others, "-")
    memory = [in_new_process("memory", kind) for kind in ("labels", "labels of transformers")]
    sizes = " / ".join(f"{size:.0f}" for size in memory)
    yield Row(f"the same: extra memory ({sizes} MB)", f"{memory[0] / memory[1]:.2f}", "0.45")
    with torch.no_grad():
        logits = ours(pixels).logits.contiguous()  # as transformers' are; another format rounds otherwise
        logits = F.interpolate(logits, size=(1024, 2048), mode="bilinear", align_corners=False)
    same = bool((logits.argmax(1) == class_by_class()).all())
    yield Row("the same: argmax of the fully upsampled logits", "identical" if same else "differs", "identical")
    agreeing = (full() == class_by_class()).double().mean().item()
    yield Row("the same: pixels labelled as by transformers (other summation order)", f"{agreeing:.6f}", "-")


def ema_rows(options: Options) -> Iterator[Row]:
    student = build_student(small_run())
    teacher, other = make_teacher(student), make_teacher(student)

    def loop() -> None:
        for own, given in zip(other.parameters(), student.parameters(), strict=True):
            own.data[:] = 0.999 * own.data[:] + (1 - 0.999) * given.data[:]

    def copies() -> None:  # the memory traffic alone, a third less of it
        for own, given in zip(other.parameters(), student.parameters(), strict=True):
            own.data.copy_(given.data)

    ours, plain, floor = interleaved(
        [lambda: update_teacher(teacher, student, 0.999), loop, copies], max(options.rounds, 21)
    )
    yield Row.ratio("EMA of B0, head and projector over a loop over parameters", ours, plain, "1/6")
    yield Row.ratio("the same over copying the parameters", ours, floor, "-")


def data_rows(options: Options) -> Iterator[Row]:
    """Reading a batch of 2 source and 2 target crops from prepared domains, against the step that uses it."""
    cfg, sizes = small_run(), {"source": (720, 1280), "target": (512, 1024)}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in sizes.items():
            drawn = load_domain(
                DomainConfig(path=f"streets-{name}", num_images=8, resize=size, resize_mode="exact"), cfg.classes
            )
            prepare(drawn, Path(folder, name), "train", len(cfg.classes), "raw", 1)
        source, target = (
            load_domain(
                DomainConfig(path=str(Path(folder, name)), resize=size, resize_mode="exact"),
                cfg.classes,
                labelled=name == "source",
            )
            for name, size in sizes.items()
        )
        loader = iter(batches(PairDataset(cfg, source, target, None)))
        times = interleaved([lambda: next(loader), make_step(cfg, Accelerator(cpu=True))], options.rounds)
    share = statistics.median(read / (read + step) for read, step in zip(*times, strict=True))
    read, step = (1000 * statistics.median(one) for one in times)
    yield Row(f"data: share of a T2S-DA step, B0, 256 px ({read:.1f} of {step:.0f} ms)", f"{share:.1%}", "3 %")


def memory_rows(options: Options) -> Iterator[Row]:
    """The largest networks: one backward per graph, as the loop does it, against one over the sum of all losses."""
    apart, joined = (in_new_process("memory", kind) for kind in ("apart", "joined"))
    title = f"T2S-DA step, B5 with DAFormer's head, 512 px, 1+1 image: extra memory ({apart:.0f} / {joined:.0f} MB)"
    yield Row(f"{title} over one backward of the summed losses", f"{apart / joined:.2f}", "0.45")


def gradients_rows(options: Options) -> Iterator[Row]:
    """What it costs to keep the gradients of a term beside those before it, until all are added at once."""
    at_once, each = (in_new_process("memory", f"gradients {how}") for how in ("at once", "one by one"))
    title = (
        f"T2S-DA step, B0, 256 px, 2+2 images: extra memory ({at_once:.0f} / {each:.0f} MB), gradients of terms added"
    )
    yield Row(f"{title} at once over one by one", f"{at_once / each:.2f}", "1.05")


def second_step_of_b0(kind: str) -> Callable[[], object]:
    def one_by_one(losses: Mapping[str, torch.Tensor], weights: LossWeights, _: object) -> None:
        first = [torch.tensor(float(vars(weights)[name])) for name in losses]
        torch.autograd.backward(list(losses.values()), first)

    if kind.endswith("one by one"):
        loop.backward = one_by_one  # type: ignore[assignment]
    step = make_step(small_run(), Accelerator(cpu=True))
    step()
    return step


def step_of_b5(kind: str) -> Callable[[], object]:
    cfg = small_run("mit_b5", "daformer", 512, batch_size=1)
    objective = METHODS["t2sda"]

    def joined(step: Step) -> Iterator[Graph]:
        graphs = list(objective(step))
        yield Graph({name: loss for graph in graphs for name, loss in graph.losses.items()}, graphs[-1].seen)

    return make_step(cfg, Accelerator(cpu=True), joined if kind == "joined" else objective)


def measure_memory(kind: str) -> None:
    if kind == "metric":
        maps = two_maps()
        print(json.dumps(extra_memory(lambda: scores(confusion_matrix(*maps, 19)))))
    elif kind.startswith("labels"):
        print(json.dumps(extra_memory(label_makers()[kind != "labels"])))
    elif kind.startswith("gradients"):
        print(json.dumps(extra_memory(second_step_of_b0(kind))))
    else:
        print(json.dumps(extra_memory(pull_pass()[0] if kind == "pull" else step_of_b5(kind))))


def processes_rows(options: Options) -> Iterator[Row]:
    """CPU time of a step on the first of two processes, against a process alone; they take turns."""
    turns: list[list[float]] = [[], []]
    for _ in range(3):
        for index in (0, 1):
            turns[index] += in_new_process("step", processes=1 + index)
    alone, two = (statistics.median(times) for times in turns)
    title = f"step of two processes over one, B0, 128 px, 2+2 images each ({1000 * two:.0f} / {1000 * alone:.0f} ms)"
    yield Row(title, f"{two / alone:.2f}", "1.10")


def measure_step() -> None:
    accelerator = Accelerator(cpu=True)
    step = make_step(small_run(side=128), accelerator)
    (times,) = interleaved([step], 10)
    if accelerator.is_main_process:
        print(json.dumps(times))
    accelerator.end_training()


def launches_rows(options: Options) -> Iterator[Row]:
    """What an update of MiT-B0, or of DeepLab-V2, asks of a GPU, see `t2sda_hf.training.launches`, for any crop."""
    crops = ["--data={crop_size: [128, 128], outer_crop_size: [128, 192]}", "--hrda.crop_size=[64, 64]"]
    always = ["--augment={jitter_probability: 1.0, blur_probability: 1.0}", "--uda={ignore_top: 0, ignore_bottom: 0}"]
    small = ["--model.size=mit_b0"]  # a larger one only has more kernels in its networks
    runs = [[f"gta_cityscapes/t2sda_{name}", *small, *crops, *always] for name in ("daformer", "hrda", "mic")]
    runs += [["gta_cityscapes/t2sda_deeplabv2", *crops, *always]]
    runs += [["generalization/demo", "--translate.engine=gaussian_blur"]]
    runs += [["gta_cityscapes/source_only", *small, *crops, *always]]
    halves = [[*run, "--train.precision=bf16"] for run in runs[:3]]
    said = subprocess.run(
        [sys.executable, "-m", "t2sda_hf.training.launches", "-"],
        input=json.dumps(runs + halves),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    account = [json.loads(line) for line in said.splitlines()]
    for (recipe, *_), found in zip(runs, account[: len(runs)], strict=True):
        supervised = recipe.endswith("source_only")
        yield Row(f"{recipe}: waits of the host", str(sum(found["waits"].values())), "1" if supervised else "2")
        yield Row(f"{recipe}: kernels", str(sum(found["parts"].values())), "-")
        goals = {"pull": "80", "images": "60", "update": "40"}
        for part, number in sorted(found["parts"].items()):
            yield Row(f"{recipe}: kernels, {part}", str(number), goals.get(part, "-"))
        yield Row(f"{recipe}: MB to the device", f"{found['copied']['to device'] / 1e6:.2f}", "-")
    for (recipe, *_), found, half in zip(halves, account[: len(halves)], account[len(runs) :], strict=True):
        plain, halved = (sum(one["parts"].values()) for one in (found, half))
        yield Row(f"{recipe}: kernels in bf16 ({halved}) over those in TF32", f"{halved / plain:.3f}", "1.1")


ROWS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "supervised": supervised_rows,
    "step": step_rows,
    "encoders": encoders_rows,
    "pull": pull_rows,
    "fda": fda_rows,
    "metric": metric_rows,
    "inference": inference_rows,
    "ema": ema_rows,
    "data": data_rows,
    "memory": memory_rows,
    "gradients": gradients_rows,
    "processes": processes_rows,
    "launches": launches_rows,
}


def machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{cpu_name()}, {os.cpu_count()} cores, one thread used; {versions}, numpy {np.__version__}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--mean-iou", default="mean_iou", metavar="NAME", help="for evaluate.load; default: the Hub's")
    parser.add_argument("--peer-path", type=Path, metavar="DIR", help="checkout of DAFormer")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.measure:
        {"memory": measure_memory, "step": measure_step}[args.measure[0]](*args.measure[1:])
        return 0
    if args.peer_path is not None:
        if not (args.peer_path / "mmseg").is_dir():
            parser.error(f"--peer-path {args.peer_path} has no folder mmseg: give a checkout of DAFormer.")
        sys.path.insert(0, str(args.peer_path))
    print(f"{machine()}\n\n| what | measured | goal, at most |\n| :--- | ---: | ---: |")
    for name in args.rows:
        for row in ROWS[name](Options(args.rounds, args.mean_iou, args.peer_path)):
            print(f"| {row.what} | {row.measured} | {row.goal} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))

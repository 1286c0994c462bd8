"""Check and measure this package on a GPU in at most nine minutes: python scripts/gpu_check.py [--seconds 540]

Prints a Markdown table: what the device can do at most, whether the parts compute on it what they compute on the CPU,
how often an update makes the host wait and how many kernels it launches, whether updates repeat bit by bit, time and
memory of updates and of inference beside transformers, a short adaptation of the drawn streets, and what compiling
brings. Weights are random and nothing is downloaded. A phase that fails says so in a row and the next one goes on; one
for which no time is left says that.

--device cpu --tiny runs every phase in seconds, to try the script itself where there is no GPU.
"""

import argparse
import gc
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.device import allow_tf32, choose_algorithms, make_accelerator
from t2sda_hf.evaluation.inference import predict_labels
from t2sda_hf.evaluation.watch import Watch
from t2sda_hf.hub.card import cpu_name
from t2sda_hf.losses.feature_distance import feature_distance
from t2sda_hf.losses.pull import num_queries_per_class, pull_loss, sample_pull, sort_by_class
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.masking import run_masked
from t2sda_hf.methods import METHODS
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation
from t2sda_hf.teacher import class_probabilities
from t2sda_hf.training.attention import sdpa_in_groups
from t2sda_hf.training.build import compile_networks
from t2sda_hf.training.checkpoint import Progress
from t2sda_hf.training.derive import without_data
from t2sda_hf.training.estimate import random_batch, random_student, stand_in_engine
from t2sda_hf.training.loop import Run, update
from t2sda_hf.training.parts import make_parts
from t2sda_hf.training.resume import config_of
from t2sda_hf.training.tracking import Tracker
from t2sda_hf.translate.fda import fda_translate

GTA = "gta_cityscapes"
SMALLEST = ["--model={depths: [1, 1, 1, 1], hidden_sizes: [8, 8, 16, 16], num_attention_heads: [1, 1, 2, 2]}"]
SMALLEST += ["--model.decoder_hidden_size=16", "--projector={hidden: 8, dim: 8}", "--hrda.crop_size=[32, 32]"]
SMALLEST += ["--data={crop_size: [64, 64], outer_crop_size: [64, 96]}", "--pull={num_queries: 8, num_negatives: 16}"]
SMALLEST += ["--uda={ignore_top: 0, ignore_bottom: 0}", "--patch_mask.block_size=16"]


class Updates:
    """Called, it makes the next update of a run."""

    def __init__(self, run: Run, tracker: Tracker) -> None:
        self.student = run.parts.networks.student
        self._run, self._tracker, self._steps = run, tracker, itertools.count(run.cfg.full_from)

    def __call__(self) -> None:
        update(self._run, next(self._steps), self._tracker)


@dataclass(frozen=True)
class Bench:
    """Where and how large is measured."""

    device: torch.device
    tiny: bool
    end: float = math.inf  # of the time there is, by time.monotonic

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def config(self, recipe: str, *overrides: str, method: str = "t2sda") -> RunConfig:
        """A recipe without trackers; with --tiny of the smallest networks and crops."""
        words = ["--train={log_with: [], max_steps: 1000}", *overrides, *(SMALLEST if self.tiny else [])]
        return config_of(without_data(load_config(recipe, words)), method)

    def accelerator(self, precision: str) -> Accelerator:
        AcceleratorState._reset_state()
        PartialState._reset_state()
        return make_accelerator(precision, cpu=not self.on_gpu)

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Median of 3 to 12 calls, about two seconds of them; on a GPU with all that it was asked for."""
        times = list[float]()
        for _ in range(1 if self.tiny else 12):
            self.finish()
            began = time.perf_counter()
            function()
            self.finish()
            times.append(1000 * (time.perf_counter() - began))
            if len(times) >= 3 and sum(times) > 2000:
                break
        return statistics.median(times)

    def finish(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def measured(self, function: Callable[[], object]) -> str:
        """Time and peak memory of a call in words, once it is warm: cuDNN tries its algorithms before."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        try:
            for _ in range(1 if self.tiny else 3):
                function()
            if not self.on_gpu:
                return f"{self.milliseconds(function):.3g} ms"
            torch.cuda.reset_peak_memory_stats(self.device)
            took = self.milliseconds(function)
        except torch.OutOfMemoryError:
            return "out of memory"
        return f"{took:.3g} ms, {torch.cuda.max_memory_allocated(self.device) / 1e9:.3g} GB"

    def measured_updates(self, cfg: RunConfig) -> str:
        with self.updates(cfg) as step:
            return self.measured(step)

    @contextmanager
    def updates(self, cfg: RunConfig) -> Iterator[Updates]:
        """Real updates of a run from its random weights, on one random batch that lies in pinned memory."""
        accelerator = self.accelerator(cfg.train.precision)
        batch = random_batch(cfg).pin_memory() if self.on_gpu else random_batch(cfg)
        student = random_student(cfg).train().to(self.device)
        watch = Watch([100] * len(cfg.classes), cfg.uda.pseudo_threshold).to(self.device)
        parts = make_parts(cfg, student, stand_in_engine(cfg), accelerator, watch)
        choose_algorithms(cfg.train.deterministic)
        if cfg.train.compile != "none":
            compile_networks([parts.networks.student, parts.networks.teacher], cfg.train.compile)
        run = Run(cfg, accelerator, parts, METHODS[cfg.method], itertools.repeat(batch))
        with (
            tempfile.TemporaryDirectory() as folder,
            Tracker(accelerator, Path(folder), cfg.train.max_steps, Progress(), cfg.method, False) as tracker,
        ):
            yield Updates(run, tracker)


Rows = Iterator[tuple[str, str]]


def on(device: torch.device, value: Any) -> Any:
    """A tensor, or a dataclass of some, there."""
    if isinstance(value, Tensor):
        return value.to(device)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{field.name: on(device, getattr(value, field.name)) for field in fields(value)})
    return value


def differs(found: Any, expected: Any) -> float:
    """The largest difference over the largest size."""
    found, expected = found.detach().double().cpu(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def parity(bench: Bench) -> Rows:
    """The same inputs on the CPU and on the device, in float32."""
    allow_tf32("float32")
    random, classes = torch.Generator().manual_seed(0), 19
    small = 32 if bench.tiny else 128
    maps = torch.randn(2, classes, small, small, generator=random)
    labels = torch.randint(0, classes, (2, 4 * small, 4 * small), generator=random)
    few = labels[:, ::4, ::4].contiguous()
    keys, queries = (torch.randn(2, 32, small, small, generator=random) for _ in range(2))
    images = torch.rand(2, 2, 3, 2 * small, 4 * small, generator=random)
    prototypes, weights = torch.randn(classes, 32, generator=random), torch.full((classes,), 1 / classes)
    counts = few.flatten().bincount(minlength=classes).double()
    wanted = num_queries_per_class(counts, classes, 64, "cbqs")
    pixels = sort_by_class(torch.stack([few, few.flip(1)]), classes, random)
    samples = sample_pull(pixels, wanted, 65 * classes, 128, random)
    frozen = torch.randn(2, 32, small // 8, small // 8, generator=random)

    def pull(device: torch.device) -> Tensor:
        given = (on(device, value) for value in (keys, queries, prototypes, samples, weights))
        own_keys, own_queries, own_prototypes, own_samples, own_weights = given
        found = own_queries.clone().requires_grad_(True)
        compared = own_keys, own_keys.flip(0), own_prototypes, own_samples, own_weights
        loss = pull_loss(found, *compared, temperature=0.2)
        loss.backward()
        assert found.grad is not None
        return torch.cat([loss.detach().view(1), found.grad.flatten()])

    def attended(attend: Callable[..., Any], device: torch.device, *shapes: tuple[int, ...]) -> Tensor:
        """Outputs and gradients of queries, keys and values of these shapes."""
        draw = torch.Generator().manual_seed(1)
        given = [torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in (*shapes, shapes[-1])]
        found, _ = attend(nn.Identity(), *given, None, scaling=shapes[0][-1] ** -0.5, is_causal=False)
        found.backward(torch.randn(found.shape, generator=draw).to(device))
        return torch.cat([found.detach().flatten(), *(one.grad.flatten() for one in given if one.grad is not None)])

    def attention(device: torch.device) -> Tensor:
        """As SegFormer's at strides 4 and 8 of crops of 512: on a large GPU in groups, on a CPU never."""
        side = 64 if bench.tiny else 16384
        first = (2, 1, side, 32), (2, 1, side // 64, 32)
        second = (2, 2, side // 4, 32), (2, 2, side // 64, 32)
        return torch.cat([attended(sdpa_in_groups, device, *shapes) for shapes in (first, second)])

    cases: dict[str, Callable[[torch.device], Tensor]] = {
        "attention in groups and its gradients": attention,
        "cross-entropy": lambda d: segmentation_loss(on(d, maps), on(d, labels)),
        "pull and its gradient": pull,
        "feature distance": lambda d: feature_distance(
            on(d, frozen), on(d, frozen.flip(0)), on(d, labels), classes, None, 0.75
        ),
        "pseudo-labels": lambda d: class_probabilities(on(d, maps), (4 * small, 4 * small)).amax(dim=1),
        "FDA": lambda d: fda_translate(*on(d, images), 0.05),
    }
    for name, case in cases.items():
        yield f"{name}: device over CPU", f"{differs(case(bench.device), case(torch.device('cpu'))):.1e}"
    for head, size in (("daformer", "mit_b0"), ("all_mlp", "mit_b0"), ("deeplabv2", "resnet101c")):
        torch.manual_seed(0)
        network = T2SDAForSemanticSegmentation(T2SDAConfig.from_size(size, head=head)).eval()
        with torch.no_grad():
            expected = network(images[0, :, :, :64, :64], project=True)
            found = network.to(bench.device)(images[0, :, :, :64, :64].to(bench.device), project=True)
        worst = max(differs(found[name], expected[name]) for name in ("logits", "embeddings"))
        yield f"{size} with {head}, logits and embeddings: device over CPU", f"{worst:.1e}"
    for recipe in ("t2sda_daformer", "t2sda_mic", "source_only"):
        yield f"losses of an update, {recipe}: device over CPU", f"{losses_differ(bench, recipe):.1e}"
    allow_tf32("tf32")
    source, target = (255 * image for image in images)
    exact = fda_translate(source.double(), target.double(), 0.05)
    error = (fda_translate(source.to(bench.device), target.to(bench.device), 0.05).cpu() - exact).abs().max()
    yield "FDA where TF32 is allowed: largest error of 255 (goal 0.001)", f"{error:.1e}"


def losses_differ(bench: Bench, recipe: str) -> float:
    """Largest difference of the losses of one update that draw on the host alone, so not of the pull."""
    cfg = replace(bench, tiny=True).config(f"{GTA}/{recipe}", "--train.precision=float32", "--loss_weights.pull=0")
    cfg = replace(cfg, model=replace(cfg.model, head_dropout=0.0, drop_path_rate=0.0))
    cfg = replace(cfg, loss_weights=replace(cfg.loss_weights, feature_distance=0.0))
    if recipe == "source_only":
        cfg = config_of(cfg, "source_only")
    logged = []
    for device in (bench.device, torch.device("cpu")):
        seen: list[dict[str, Tensor]] = []
        own = replace(bench, device=device)
        method = METHODS[cfg.method]

        def watched(step: Any, method: Any = method, seen: list[dict[str, Tensor]] = seen) -> Iterator[Any]:
            for graph in method(step):
                seen.append(graph.losses)
                yield graph

        METHODS[cfg.method] = watched
        try:
            with own.updates(cfg) as step:
                step()
        finally:
            METHODS[cfg.method] = method
        logged.append({name: value for terms in seen for name, value in terms.items()})
    return max(differs(logged[0][name], value.detach().cpu()) for name, value in logged[1].items())


def waits(bench: Bench) -> Rows:
    """How often an update makes the host wait for the GPU, by torch's own warnings."""
    if not bench.on_gpu:
        yield "waits of an update", "needs a GPU; without one: python scripts/benchmark.py --rows launches"
        return
    for recipe, method in (("t2sda_daformer", "t2sda"), ("t2sda_mic", "t2sda"), ("source_only", "source_only")):
        with bench.updates(small(bench, recipe, method)) as step, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                step()
            torch.cuda.set_sync_debug_mode("warn")
            caught.clear()  # the mode itself warns that it is a prototype
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
        yield f"{recipe}, B0: waits of the host in an update", f"{sum(places.values())} ({dict(places)})"


def small(bench: Bench, recipe: str, method: str) -> RunConfig:
    """A recipe with B0 and crops of 256."""
    crops = "--data={crop_size: [256, 256], outer_crop_size: [256, 512]}"
    more = ["--model.size=mit_b0", crops, "--hrda.crop_size=[128, 128]", "--uda={ignore_top: 0, ignore_bottom: 0}"]
    return bench.config(f"{GTA}/{recipe}", *more, method=method)


_ATTENTION_BACKWARD = re.compile(r"AttentionBackward|fmha_cutlassB|flash_bwd|sdpa.*bprop", re.IGNORECASE)


def kernels(bench: Bench) -> Rows:
    """How many kernels an update launches, how long they take, and which ones take longest. By torch's profiler, which
    makes whatever is timed after it in this process slower."""
    if not bench.on_gpu:
        yield "kernels of an update", "needs a GPU; without one: python scripts/benchmark.py --rows launches"
        return
    whole = [("t2sda_daformer", size, precision) for size in ("mit_b0", "mit_b5") for precision in ("tf32", "bf16")]
    cases = [(f"{recipe}, B0 at 256 px", small(bench, recipe, "t2sda")) for recipe in ("t2sda_daformer", "t2sda_mic")]
    cases.append(("source_only, B0 at 256 px", small(bench, "source_only", "source_only")))
    for recipe, size, precision in whole:
        words = [f"--model.size={size}", f"--train.precision={precision}"]
        cases.append((f"t2sda, {size}, {precision}", bench.config(f"{GTA}/{recipe}", *words)))
    for name, cfg in cases:
        with bench.updates(cfg) as step:
            for _ in range(3):
                step()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                step()
                bench.finish()
        events = seen.key_averages()
        launched = sum(event.count for event in events if "LaunchKernel" in event.key)
        # Each kernel stands there twice: as itself, and in the time of the operation that launched it.
        own = [event for event in events if event.device_type == DeviceType.CUDA and "#" not in event.key]
        longest = sorted(own, key=lambda event: -event.self_device_time_total)[:3]
        said = (f"{e.self_device_time_total / 1000:.3g} ms in {e.count} {e.key[:60]}" for e in longest)
        took = sum(event.self_device_time_total for event in own) / 1000
        attention = sum(e.self_device_time_total for e in own if _ATTENTION_BACKWARD.search(e.key)) / 1000
        yield f"{name}: kernels of an update", f"{launched}, {took:.3g} ms; {', '.join(said)}"
        yield f"{name}: of these, the backward of attention", f"{attention:.3g} ms"


def ceilings(bench: Bench) -> Rows:
    """The most that the device reaches: what the times of the other rows can be measured by."""
    size, words = (64, 2**16) if bench.tiny else (8192, 2**28)
    maps = torch.randn(size, size, device=bench.device)
    for precision in ("float32", "tf32", "bf16"):
        allow_tf32(precision)
        factor = maps.bfloat16() if precision == "bf16" else maps
        took = bench.milliseconds(lambda factor=factor: factor @ factor)  # type: ignore[misc]
        yield f"product of {size}x{size}, {precision}", f"{2 * size**3 / took / 1e9:.3g} TFLOP/s"
    read = torch.randn(words, device=bench.device)
    written = torch.empty_like(read)
    took = bench.milliseconds(lambda: written.copy_(read))
    yield "copy, bytes read and written", f"{2 * read.nbytes / took / 1e6:.3g} GB/s"
    few = torch.zeros(8, device=bench.device)

    def launch() -> None:
        for _ in range(1000):
            few.add_(1)

    yield "launch of a small kernel", f"{bench.milliseconds(launch):.3g} µs"


def determinism(bench: Bench) -> Rows:
    """The same three updates twice: equal in every bit of the student's weights and statistics, or not."""
    crops = [] if bench.tiny else ["--data={crop_size: [128, 128], outer_crop_size: [128, 256]}"]
    words = ["--model.size=mit_b0", *crops, "--uda={ignore_top: 0, ignore_bottom: 0}"]
    for kept in (True, False):
        cfg = bench.config(f"{GTA}/t2sda_daformer", *words, f"--train.deterministic={str(kept).lower()}")
        found = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2):
                    torch.manual_seed(0)
                    with bench.updates(cfg) as step:
                        for _ in range(3):
                            step()
                        found.append({name: value.cpu().clone() for name, value in step.student.state_dict().items()})
        finally:
            choose_algorithms(False)
        said = {str(w.message).split(" does not")[0] for w in caught if "determinis" in str(w.message)}
        equal = sum(torch.equal(value, found[1][name]) for name, value in found[0].items())
        yield (
            f"train.deterministic {str(kept).lower()}: tensors equal after three updates made twice",
            f"{equal} of {len(found[0])}{'; without such an algorithm: ' + ', '.join(sorted(said)) if said else ''}",
        )


def steps(bench: Bench) -> Rows:
    """Updates of DAFormer's crops, supervised and T2S-DA, beside transformers' SegFormer; then the other recipes."""
    for size in ["mit_b0"] if bench.tiny else ["mit_b0", "mit_b5"]:
        yield from steps_of_size(bench, size)
    for recipe in ("t2sda_hrda", "t2sda_mic", "t2sda_deeplabv2"):
        if bench.tiny and recipe == "t2sda_deeplabv2":
            continue  # its network has no tiny form
        for precision in ("tf32", "bf16"):
            cfg = bench.config(f"{GTA}/{recipe}", f"--train.precision={precision}")
            yield f"{recipe}, {cfg.model.size}, {precision}: update", bench.measured_updates(cfg)


def other_sizes(bench: Bench) -> Rows:
    """The rows of `steps` for the sizes between the smallest and the largest."""
    if bench.tiny:
        yield "updates of B1 to B4", "left out: there is one tiny size"
        return
    for number in (1, 2, 3, 4):
        yield from steps_of_size(bench, f"mit_b{number}")


def steps_of_size(bench: Bench, size: str) -> Rows:
    for precision in ("tf32", "bf16"):
        words = [f"--model.size={size}", f"--train.precision={precision}"]
        yield f"transformers' SegFormer, {size}, {precision}: update", bench.measured(theirs(bench, size, precision))
        for method in ("source_only", "t2sda"):
            recipe = f"{GTA}/{'t2sda_daformer' if method == 't2sda' else method}"
            cfg = bench.config(recipe, *words, method=method)
            yield f"{method}, {size}, {precision}: update", bench.measured_updates(cfg)


def compiled(bench: Bench) -> Rows:
    """T2S-DA updates as they are, compiled, and compiled into CUDA graphs."""
    if not bench.on_gpu:
        yield "updates, compiled", "needs a GPU"
        return
    for backend in ("none", "inductor", "cuda_graphs"):
        words = ["--model.size=mit_b0", "--train.precision=bf16", f"--train.compile={backend}"]
        began = time.perf_counter()
        with bench.updates(bench.config(f"{GTA}/t2sda_daformer", *words)) as step:
            step()
            step()
            bench.finish()
            yield f"mit_b0, bf16, {backend}: seconds of the first two updates", f"{time.perf_counter() - began:.3g}"
            for _ in range(3):
                step()
            torch.cuda.reset_peak_memory_stats(bench.device)
            took = bench.milliseconds(step)
            held = torch.cuda.max_memory_reserved(bench.device) / 1e9  # replays allocate nothing
            yield f"mit_b0, bf16, {backend}: update", f"{took:.3g} ms, {held:.3g} GB reserved"
        torch.compiler.reset()
        torch.cuda.empty_cache()


def segformer(bench: Bench, size: str) -> SegformerForSemanticSegmentation:
    """transformers' own, of the size of ours."""
    ours = T2SDAConfig.from_size(size, head="all_mlp", num_labels=19)
    sizes = {"depths": ours.depths, "hidden_sizes": ours.hidden_sizes, "decoder_hidden_size": ours.decoder_hidden_size}
    if bench.tiny:
        sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, num_labels=19)).to(bench.device)


def theirs(bench: Bench, size: str, precision: str) -> Callable[[], object]:
    """A supervised update of transformers' SegFormer on two images, with its own loss and torch's fused AdamW."""
    accelerator = bench.accelerator(precision)
    network: Any = accelerator.prepare_model(segformer(bench, size).train(), evaluation_mode=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-5, fused=True)
    side = 64 if bench.tiny else 512
    images = torch.rand(2, 3, side, side, device=bench.device)
    labels = torch.randint(0, 19, (2, side, side), device=bench.device)

    def step() -> None:
        network(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(bench: Bench) -> Rows:
    """Labels of an image of Cityscapes, beside transformers' SegFormer with full upsampling."""
    height, width = (64, 128) if bench.tiny else (1024, 2048)
    pixels = torch.rand(1, 3, height, width, device=bench.device)
    for size in ["mit_b0"] if bench.tiny else ["mit_b0", "mit_b5"]:
        allow_tf32("tf32")
        network = segformer(bench, size).eval()
        with tempfile.TemporaryDirectory() as folder:  # the same weights
            network.save_pretrained(folder)
            ours = T2SDAForSemanticSegmentation.from_pretrained(folder).eval().to(bench.device)

        @torch.no_grad()
        def full(network: nn.Module = network) -> Tensor:
            logits = network(pixels).logits
            return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False).argmax(1)

        def own(ours: nn.Module = ours) -> Tensor:
            return predict_labels(ours, pixels, (height, width))

        yield f"transformers' SegFormer, {size}: labels of {height}x{width}", bench.measured(full)
        yield f"ours, {size}: labels of {height}x{width}", bench.measured(own)
        yield f"ours, {size}: pixels labelled as by transformers", f"{(full() == own()).double().mean():.5f}"


def adaptation(bench: Bench) -> Rows:
    """`t2sda train` on the drawn streets: how long it takes, and what it gains over the source alone."""
    words = ["--train.max_steps=2", "--source.num_images=4", "--target.num_images=4", "--test.num_images=2"]
    words += ["--model={depths: [1, 1, 1, 1], hidden_sizes: [8, 8, 16, 16], num_attention_heads: [1, 1, 2, 2]}"]
    words += ["--data={crop_size: [32, 32], outer_crop_size: [32, 32]}", "--evaluation.source_images=0"]
    words = [*words, "--optim.warmup_steps=0", "--train.log_with=[]"] if bench.tiny else ["--train.max_steps=400"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "t2sda_hf",
            "train",
            "--config",
            "demo",
            "--output_dir",
            f"{folder}/run",
            *words,
        ]
        environment = os.environ | ({} if bench.on_gpu else {"ACCELERATE_USE_CPU": "true"})
        left = None if math.isinf(bench.end) else max(bench.end - time.monotonic(), 1)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
        summary = json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))
        log = Path(folder, "run", "t2sda", "scalars.jsonl").read_text(encoding="utf-8").splitlines()
    last = [line for line in map(json.loads, log) if "seconds_per_step" in line][-1]
    yield "demo: mIoU of t2sda", f"{summary['t2sda']['miou']:.2f}"
    yield "demo: its gain over the source alone", f"{summary['gain']:+.2f}"
    yield "demo: seconds of both runs", str(summary["seconds"])
    yield (
        "demo: ms of an update, and the share of waiting for data",
        (f"{1000 * last['seconds_per_step']:.3g}, {last['data_share']:.1%}"),
    )


# Phase -> seconds without which it is not begun; what is dearest to know comes first.
PHASES: dict[str, tuple[Callable[[Bench], Rows], float]] = {
    "ceilings": (ceilings, 10),
    "parity": (parity, 20),
    "waits": (waits, 20),
    "determinism": (determinism, 20),
    "steps": (steps, 30),
    "inference": (inference, 20),
    "adaptation": (adaptation, 60),
    "compiled": (compiled, 120),
    "kernels": (kernels, 30),
    "other_sizes": (other_sizes, 60),
}


def card(device: torch.device) -> str:
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}"
    if device.type != "cuda":
        return f"{cpu_name()}, no GPU; {versions}"
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GB; {versions}, CUDA {torch.version.cuda}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest networks and images")
    parser.add_argument("--seconds", type=float, default=540, help="all in all; default: 540")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. Install a torch that does, or try the script with --device cpu --tiny.")
    end, failed = time.monotonic() + args.seconds, 0
    bench = Bench(torch.device(args.device), args.tiny, end)
    if bench.on_gpu:  # read at the first product, for `determinism`
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = True  # as in a training
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"{card(bench.device)}\n\n| phase | what | measured |\n| :--- | :--- | ---: |", flush=True)

    def show(phase: str, what: str, measured: str) -> None:
        cells = (re.sub(r"\s+", " ", cell).replace("|", "/") for cell in (phase, what, measured))
        print(f"| {' | '.join(cells)} |", flush=True)

    for phase in args.phases:
        rows, needed = PHASES[phase]
        if end - time.monotonic() < needed:
            show(phase, "not begun", "no time is left")
            continue
        try:
            for what, measured in rows(bench):
                show(phase, what, measured)
                if time.monotonic() > end:
                    show(phase, "ended here", "no time is left")
                    break
        except Exception as error:  # any: the other phases are worth having, and the exit code says that one failed
            traceback.print_exc()
            show(phase, "failed", f"{type(error).__name__}: {error}"[:300])
            failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run_masked(main))

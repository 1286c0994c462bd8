"""What an update costs, found without making it: operations, memory, and time by roofline.

The real objective runs on random images, but its networks are stand-ins. Behind each the real network runs on torch's
fake tensors, which have shapes and no content. Every operation and every tensor is counted on the way. So the passes,
the terms of weight 0, HRDA's crops or checkpointing cost here what the objective makes of them; no formula is kept
beside it that could say something else.
"""

import itertools
import resource
import statistics
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers.utils import ModelOutput

from ..batch import UdaBatch
from ..config import RunConfig
from ..device import make_accelerator
from ..methods import METHODS, ClassMemory, Step, make_networks
from ..models import T2SDAConfig, T2SDAForSemanticSegmentation
from ..teacher import update_teacher
from ..translate import TranslationEngine, build_engine
from .build import build_student
from .checkpoint import Progress, allocate_state
from .loop import Run, alone, backward, update
from .optim import make_optimizer
from .parts import half_weights, make_parts
from .seeding import seed_step
from .tracking import Tracker


@dataclass
class Cost:
    """What was counted. An operation is one kernel; views and shape questions are none.

    Attributes:
        flops: of every operation; matrix products, convolutions and attention only, 2 for a multiply-add.
        bytes: read and written by every operation, if nothing stays in a cache.
        halves: whether the operation is in bfloat16.
        live, peak: bytes of tensors, now and at most.
        lasting: bytes between updates: weights of all networks, and the optimiser's.
        passes: forwards of images by network and part: "student encoder", "teacher head", ...
    """

    flops: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    halves: list[bool] = field(default_factory=list)
    live: int = 0
    peak: int = 0
    lasting: int = 0
    passes: Counter[str] = field(default_factory=Counter)
    fused: bool = False  # by a compiler, which launches fewer than are counted
    _known: dict[int, Any] = field(default_factory=dict)

    def hold(self, tensor: Tensor, counts: bool = True) -> None:
        """Count the memory of a tensor until it is freed; once, whatever views there are of it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._known:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)

    def seconds(self, device: "Device", precision: str) -> float:
        """Roofline: every operation takes as long as its products or its memory traffic, whichever is longer. All of
        them together take as long as it takes to launch them.
        """
        full = device.tf32 if precision != "float32" else device.float32
        peaks = np.where(self.halves, device.bf16, full)
        busy = float(np.maximum(np.array(self.flops) / peaks, np.array(self.bytes) / device.bandwidth).sum())
        return max(busy, self.launching(device))

    def launching(self, device: "Device") -> float:
        """Seconds in which the host launches all operations, one after the other."""
        return 0.0 if self.fused else len(self.flops) * device.launch


@dataclass(frozen=True)
class Device:
    """Peaks in operations and bytes per second, dense; memory in bytes; `launch` in seconds for each operation."""

    name: str
    float32: float
    tf32: float  # what there is for it, where there is no TF32
    bf16: float
    bandwidth: float
    memory: float
    launch: float = 0.0


LAUNCH = 6e-6  # of torch on a fast host: an assumption; those of two H100s took 11 µs, with what torch does 39 to 92


def _gpu(name: str, float32: float, tf32: float, bf16: float, bandwidth: float, memory: float) -> Device:
    return Device(name, float32 * 1e12, tf32 * 1e12, bf16 * 1e12, bandwidth * 1e9, memory * 1e9, LAUNCH)


# The makers' data sheets, without sparsity: TFLOP/s in float32, TF32 and bfloat16, GB/s, GB. No bfloat16 on V100 and
# T4: float32 stands there.
GPUS = (
    _gpu("H100 SXM 80 GB", 67, 494, 989, 3350, 80),
    _gpu("A100 SXM 80 GB", 19.5, 156, 312, 2039, 80),
    _gpu("A100 PCIe 40 GB", 19.5, 156, 312, 1555, 40),
    _gpu("L40S 48 GB", 91.6, 183, 362, 864, 48),
    _gpu("RTX 4090 24 GB", 82.6, 82.6, 165, 1008, 24),
    _gpu("RTX 3090 24 GB", 35.6, 35.6, 71, 936, 24),
    _gpu("L4 24 GB", 30.3, 60, 121, 300, 24),
    _gpu("V100 SXM 32 GB", 15.7, 15.7, 15.7, 900, 32),
    _gpu("T4 16 GB", 8.1, 8.1, 8.1, 320, 16),
)


def this_machine() -> Device:
    """The CPU, by what a matrix product of 1024 x 1024 and a copy of 64 MB reach here: the best of five."""

    def best(function: Any) -> float:
        times = []
        for _ in range(5):
            began = time.process_time()
            function()
            times.append(time.process_time() - began)
        return min(times) / torch.get_num_threads()  # CPU time, which neighbours on the machine do not lengthen

    square, half = torch.rand(1024, 1024), torch.rand(256, 256).bfloat16()
    whole, copy = torch.rand(2**24), torch.empty(2**24)
    float32 = 2 * 1024**3 / best(lambda: square @ square)
    name = f"this machine, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    bandwidth = 2 * whole.nbytes / best(lambda: copy.copy_(whole))
    memory = psutil.virtual_memory().total
    return Device(name, float32, float32, 2 * 256**3 / best(lambda: half @ half), bandwidth, memory)


class Counting(TorchDispatchMode):
    """Puts every operation and every new tensor on the account of `cost`."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made:
            return result
        for tensor in made:
            self.cost.hold(tensor)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shared = {tensor.untyped_storage()._cdata for tensor in given}
        writes = func._schema.is_mutable
        if given and not writes and all(tensor.untyped_storage()._cdata in shared for tensor in made):
            return result  # a view
        touched = {id(tensor): tensor for tensor in [*given, *made]}.values()
        self.cost.flops.append(products(func, args, made))
        self.cost.bytes.append(sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in touched))
        self.cost.halves.append(made[0].dtype == torch.bfloat16)
        return result


def products(func: Any, args: Sequence[Any], made: Sequence[Tensor]) -> float:
    """Floating point operations of one call: 2 · multiply-adds of products, convolutions and attention, 0 for others.

    A backward of attention counts twice its forward, as for all others, although it makes the scores once more.

    Args:
        func: an overload of torch.ops.aten.
        args: of the call.
        made: the tensors it returned.
    """
    name = func.overloadpacket.__name__
    if name in ("mm", "bmm"):
        return 2.0 * made[0].numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2.0 * made[0].numel() * args[1].shape[-1]
    if name == "convolution":  # the weight is (out, in / groups, kernel, kernel)
        return 2.0 * made[0].numel() * prod(args[1].shape[1:])
    if name == "convolution_backward":  # by gradient, input, weight; the last argument says which gradients are made
        return 2.0 * args[0].numel() * prod(args[2].shape[1:]) * sum(args[-1][:2])
    if name.startswith("_scaled_dot_product"):
        backward = name.endswith("backward")
        query, key = args[1:3] if backward else args[:2]
        return (8.0 if backward else 4.0) * query.numel() * key.shape[-2]
    return 0.0


def count_update(cfg: RunConfig) -> Cost:
    """The cost of one update in the middle of a run of `cfg`, of one process, on a CPU.

    Images are random, and so are the pseudo-labels. Images that are translated by networks (style, trained) are taken
    as they are, without the cost of it.
    """
    if cfg.from_finished or cfg.method == "distil":
        raise ValueError(
            f"what method {cfg.method} with a start_model costs is not counted: `t2sda train --dry-run` measures its "
            "updates instead."
        )
    cost, fake = Cost(fused=cfg.train.compile in ("inductor", "cuda_graphs")), FakeTensorMode()
    with torch.device("meta"):
        meta = random_student(cfg)
    networks = make_networks(cfg, meta.train(), stand_in_engine(cfg))
    with fake, Counting(cost):
        known: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # what is not trained is one tensor in all networks
        networks = networks.each(lambda _, network: _fake(network, known))
        optimizer = make_optimizer(meta.pretrained_encoder, meta, cfg.optim)
        allocate_state(optimizer)
        halves = half_weights(cfg, networks) if cfg.train.precision == "bf16" else None
    cost.lasting = cost.live
    stand_ins = networks.each(lambda name, network: StandIn(network, name, fake, cost, cfg))
    memory = ClassMemory(len(cfg.classes), cfg.projector.dim)
    cost.flops, cost.bytes, cost.halves = [], [], []
    with ExitStack() as around:
        around.enter_context(torch.random.fork_rng(devices=[]))
        if halves is not None:
            with fake, Counting(cost):
                around.enter_context(halves.in_place())
        around.enter_context(Counting(cost))
        for micro in range(cfg.train.micro_batches):
            generators = seed_step(cfg.seed, cfg.full_from, micro, torch.device("cpu"))
            batch = random_batch(cfg).on(torch.device("cpu"))
            step = Step(batch, stand_ins, cfg, memory, *generators, alone, cfg.full_from)
            for graph in METHODS[cfg.method](step):
                backward(graph.losses, cfg.loss_weights, networks.student.parameters())
                if halves is not None:
                    with stand_ins.student.faked(), Counting(cost):  # type: ignore[operator]
                        halves.hand_over()
            del graph  # with all that was seen
    with fake, Counting(cost):
        for parameter in networks.student.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(networks.teacher, networks.student, cfg.uda.ema_momentum)
    _forget_sizes(networks.student)
    return cost


def _forget_sizes(network: nn.Module) -> None:
    """Empty transformers' caches of what depends on sizes alone (DINOv3's positions): the next network of this process
    must not meet a fake tensor there."""
    for module in {sys.modules[type(part).__module__] for part in network.modules()}:
        for function in vars(module).values():
            for cell in getattr(function, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


def least_memory(cfg: RunConfig) -> dict[str, float]:
    """Bytes that a run of `cfg` needs in any case, by the keys that decide; far less than `count_update` finds.

    Networks with gradients and the optimiser's two moments; queries, negatives and their similarities; images and
    logits of a batch, where the size of the crop is given.
    """
    with torch.device("meta"):
        parameters = list(random_student(cfg).parameters())
    adapts = not cfg.supervised
    numbers = sum(p.numel() * ((5 if adapts else 4) if p.requires_grad else 1) for p in parameters)
    needed = {"model.depths, model.hidden_sizes and the other sizes": 4.0 * numbers}
    if adapts and cfg.loss_weights.pull:
        queries, negatives = cfg.pull.num_queries, cfg.pull.num_negatives
        cells = queries * negatives + (queries + negatives) * cfg.projector.dim
        needed["pull.num_queries and pull.num_negatives"] = 4.0 * cells
    if cfg.data.crop_size:
        pixels = cfg.train.batch_size * prod(cfg.data.crop_size)
        needed["train.batch_size and data.crop_size"] = 4.0 * pixels * (3 * (1 + adapts) + 2 * len(cfg.classes))
    return needed


def refuse_too_large(cfg: RunConfig, device: torch.device) -> None:
    """ValueError if a run needs more memory in any case than there is, before anything is built."""
    on_gpu = device.type == "cuda"
    has = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    needed = least_memory(cfg)
    if sum(needed.values()) > has:
        largest = max(needed, key=lambda name: needed[name])
        raise ValueError(
            f"this run needs at least {sum(needed.values()) / 1e9:,.0f} GB of memory, and "
            f"{'the GPU' if on_gpu else 'this machine'} has {has / 1e9:,.0f} GB. Most of it is decided by {largest}: "
            "make them smaller. `t2sda estimate` says what a run needs."
        )


def random_batch(cfg: RunConfig, seed: int = 0) -> UdaBatch:
    """A micro-batch as the loader makes it for `cfg`, of noise and of blocks of 16 pixels of one class each."""
    random, num = Generator().manual_seed(seed), cfg.train.batch_size
    height, width = cfg.data.crop_size
    outer = cfg.data.outer_crop_size if cfg.uses_outer_crop else cfg.data.crop_size

    def images(rows: int, columns: int) -> Tensor:
        return torch.randint(0, 256, (num, 3, rows, columns), dtype=torch.uint8, generator=random)

    blocks = torch.randint(0, len(cfg.classes), (num, -(-height // 16), -(-width // 16)), generator=random)
    labels = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width].byte()
    adapts, empty = cfg.self_trains, cfg.method == "source_free"
    return UdaBatch(
        source_images=images(0, 0) if empty else images(height, width),
        source_labels=labels[:, :0, :0] if empty else labels.contiguous(),
        target_images=images(height, width) if adapts else None,
        outer_source=images(*outer) if adapts and cfg.translates else None,
        style_reference=images(*outer) if adapts and cfg.translates else None,
        inner_corner=torch.zeros(num, 2, dtype=torch.int64) if adapts and cfg.translates else None,
    )


def measure_updates(cfg: RunConfig, updates: int, folder: Path) -> tuple[int, float]:
    """Make real updates of a run of `cfg` on random images, from random weights, on the CPU.

    Args:
        cfg: the run.
        updates: how many, at least 2; the first is not timed.
        folder: an empty one, for the log.

    Returns:
        Largest resident memory of this process in bytes, less what it had once a small network was trained: what
        remains then is not of this run, but code and buffers that torch loads once. It is only right in a process
        that has not needed as much before. And the median CPU seconds of an update.
    """
    for head in ("daformer", "all_mlp", "deeplabv2"):
        network = T2SDAForSemanticSegmentation(T2SDAConfig.from_size("mit_b0", head=head))
        output = network(torch.rand(1, 3, 64, 64), project=True)
        (output.logits.sum() + output.embeddings.sum()).backward()
        del network, output
    before = psutil.Process().memory_info().rss

    accelerator = make_accelerator(cfg.train.precision, cpu=True)
    parts = make_parts(cfg, random_student(cfg).train(), stand_in_engine(cfg), accelerator)
    run = Run(cfg, accelerator, parts, METHODS[cfg.method], itertools.repeat(random_batch(cfg)))
    times = []
    with Tracker(accelerator, folder, updates, Progress(), cfg.method, show=False) as tracker:
        for step in range(cfg.full_from, cfg.full_from + updates):
            began = time.process_time()
            update(run, step, tracker)
            times.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak - before, statistics.median(times[1:])


class StandIn(nn.Module):
    """A network for the objective: real outputs of the right shape, noise; the cost of the network on the account.

    Args:
        network: with fake parameters.
        name: for `Cost.passes`.
        fake: the mode of its parameters.
        cost: the account.
        cfg: the run.
    """

    def __init__(self, network: nn.Module, name: str, fake: FakeTensorMode, cost: Cost, cfg: RunConfig) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))  # so that a loss has something to be differentiated by
        self._held = (network, fake, cost)  # in a tuple, so that none of it becomes part of this module
        self._bf16 = cfg.train.precision == "bf16"
        for part, module in network.named_children():
            title = {"segformer": "encoder", "resnet": "encoder", "backbone": "encoder", "decode_head": "head"}.get(
                part, part
            )
            module.register_forward_pre_hook(self._counted(f"{name} {title}"))
        if name == "imagenet":
            network.register_forward_pre_hook(self._counted(f"{name} encoder"))

    def _counted(self, title: str) -> Any:
        def count(module: nn.Module, given: tuple[Any, ...]) -> None:
            images = given[0] if isinstance(given[0], Tensor) else given[0][0]
            self._held[2].passes[title] += len(images)

        return count

    @property
    def encoder(self) -> nn.Module:
        return self._held[0].encoder  # type: ignore[return-value]

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        network, _, cost = self._held
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in network.parameters())
        with self.faked():
            shaped = torch.empty(pixel_values.shape)
            cost.hold(shaped, counts=False)  # the real one is on the account
            with Counting(cost):
                with torch.autocast("cpu", torch.bfloat16) if self._bf16 else nullcontext():
                    output: ModelOutput = network(shaped, **kwargs)
                leaves = {name: value for name, value in output.items() if isinstance(value, Tensor)}
                deep = output.get("hidden_states")
                leaves |= {f"level {index}": level for index, level in enumerate(deep or ())}
                leaves = {name: value.float() for name, value in leaves.items()}  # as accelerate does after autocast
            edges = [get_gradient_edge(value) for value in leaves.values()] if learns else []
        with _disable_current_modes():
            real = [self._real(value) for value in leaves.values()]
        del shaped
        if learns:
            real = list(_Behind.apply(self.anchor, self, edges, pixel_values, *real))
        named = dict(zip(leaves, real, strict=True))
        for name in ("logits", "embeddings", "detail_logits", "last_hidden_state"):
            if name in output:
                output[name] = named[name]
        if deep is not None:
            output["hidden_states"] = tuple(named[f"level {index}"] for index in range(len(deep)))
        return output

    @contextmanager
    def faked(self) -> Iterator[None]:
        with _disable_current_modes(), self._held[1]:
            yield

    def _real(self, value: Tensor) -> Tensor:
        """Noise in the shape and memory format of a fake tensor, which stays on the account as long as this lives."""
        noise = torch.empty_strided(value.shape, value.stride()).normal_()
        storage, kept = noise.untyped_storage(), value.detach()
        self._held[2].hold(noise, counts=False)
        weakref.finalize(storage, lambda: kept)
        return noise


class _Behind(torch.autograd.Function):
    """Backward of a stand-in: that of the network behind it."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, stand_in: StandIn, edges: list[GradientEdge], pixel_values: Tensor, *real: Tensor
    ) -> tuple[Tensor, ...]:
        # The first convolution keeps the images for its gradient.
        ctx.stand_in, ctx.edges, ctx.pixel_values = stand_in, edges, pixel_values
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*real)
        return real

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        stand_in: StandIn = ctx.stand_in
        cost = stand_in._held[2]
        with stand_in.faked():
            used = [
                (e, torch.empty_strided(g.shape, g.stride()))
                for e, g in zip(ctx.edges, gradients, strict=True)
                if g is not None
            ]
            for _, gradient in used:
                cost.hold(gradient, counts=False)
            with Counting(cost):
                torch.autograd.backward([edge for edge, _ in used], [gradient for _, gradient in used])
        ctx.edges = ctx.pixel_values = None
        return (None,) * (4 + len(gradients))


def _fake(network: nn.Module, known: dict[int, tuple[nn.Parameter, nn.Parameter]]) -> Any:
    """The network with parameters and buffers of the running FakeTensorMode, on the CPU.

    Args:
        network: on the meta device.
        known: by id a parameter and its fake, of the networks before.
    """
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                if id(value) not in known:
                    fresh = torch.empty(value.shape, dtype=value.dtype)
                    known[id(value)] = value, nn.Parameter(fresh, requires_grad=value.requires_grad)
                module._parameters[name] = known[id(value)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


def random_student(cfg: RunConfig) -> T2SDAForSemanticSegmentation:
    """The run's student from random weights: what it costs does not depend on them."""
    return build_student(cfg, random=True)


def stand_in_engine(cfg: RunConfig) -> TranslationEngine:
    return _as_they_are if cfg.translate.engine in ("style", "trained") else build_engine(cfg.translate)


def _as_they_are(source_images: Tensor, style_images: Tensor | None, generator: Generator) -> Tensor:
    return source_images

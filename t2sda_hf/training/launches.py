"""What an update asks of a GPU, counted without one: kernels, and how often the host waits for the device.

The CPU plays a device. Every tensor on it is a wrapper around a CPU tensor, so torch dispatches as it does for a GPU,
and the values are right. Counted are operations that launch a kernel (views and questions for a shape launch none),
operations after which the host must know a value of the device, and copies between the two. An operation on tensors of
both sides raises, as it would there.

torch has one spare kind of device for this, which can be set up once per process and stays. So the count runs in a
process of its own: `python -m t2sda_hf.training.launches RECIPE [--key value ...]` prints it as one line of JSON. With
"-" in place of the recipe, standard input has a JSON list of such lists of words, and each gets a line.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from ..config import RunConfig, load_config
from ..evaluation.watch import Watch
from ..methods import METHODS, ClassMemory, make_networks
from .checkpoint import Progress
from .derive import without_data
from .estimate import random_batch, random_student, stand_in_engine
from .loop import Run, update
from .optim import make_optimizer
from .parts import Parts, half_weights
from .resume import config_of
from .tracking import Tracker

_AUTOCAST: Any = torch._C._parse_dispatch_key("AutocastPrivateUse1")
_PACKAGE = f"{os.sep}t2sda_hf{os.sep}"
# After these the host knows a value, or a size, that only the device knew. bincount asks for the least and the largest.
_WAITS = {
    **dict.fromkeys(("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"), 1),
    **dict.fromkeys(("unique_consecutive", "equal", "is_nonzero"), 1),
    "bincount": 2,
}
_NO_KERNEL = {"detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"}
_NO_KERNEL |= {"new_empty_strided", "_local_scalar_dense", "sym_size", "sym_stride", "sym_numel"}
# A function, or a file of the package, on the stack -> the part of the update; the first of these rows that fits.
_PARTS = (
    ("networks", {"transformers", f"models{os.sep}modeling_t2sda.py", f"models{os.sep}resnet.py"}),
    ("pull", {"pull_against", "pull_loss", "dynamic_weights"}),
    ("losses", {"segmentation_loss", "feature_distance", "fused_and_detail_loss"}),
    ("images", {"pseudo_labels_of", "pseudo_target", "sample_class_mix", "strong_augment", "photometric_distortion"}),
    ("images", {"mask_patches", "on", "normalize", "t2sda_losses"}),
)


@dataclass
class Launches:
    """What one update asked for.

    Attributes:
        parts: kernels by part of the update: networks (forward), pull, images, losses, backward, update.
        kernels: by line of the package.
        waits: of the host for the device, by line and reason.
        copied: bytes by direction.
    """

    parts: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)


class PlayedDevice(TorchDispatchMode):
    """Runs what is asked of "played:0" on the CPU, and keeps the account while `counts` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = False
        self.account = Launches()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, dict(kwargs or {}))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours, hosts = _split(given)
        moves = name in ("_to_copy", "copy_")
        if ours and not moves and any(host.ndim for host in hosts):
            indexed = name.startswith("index") and isinstance(args[0], Played)
            if not indexed:
                raise RuntimeError(f"{name}: tensors on the device and on the CPU at {self._place()[0]}")
            if self.counts:
                self.account.waits[f"{self._place()[0]} index given on the CPU"] += 1
        wrapped = {id(tensor.elem): tensor for tensor in ours}
        plain_args, plain_kwargs = tree_map(_unwrapped, (args, kwargs))
        device = kwargs.get("device")
        on_device = bool(ours)
        if device is not None:
            on_device = torch.device(device).type == DEVICE.type
            plain_kwargs["device"] = torch.device("cpu")
        if name == "copy_":
            on_device = isinstance(args[0], Played)
        result = func(*plain_args, **plain_kwargs)
        if self.counts:
            self._book(func, name, args, kwargs, on_device, result)

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or isinstance(leaf, Played):
                return leaf
            if id(leaf) in wrapped:
                return wrapped[id(leaf)]
            return Played(leaf) if on_device else leaf

        return tree_map(wrap, result)

    def _book(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_device: bool, result: Any
    ) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours, hosts = _split(given)
        if not ours and not on_device:
            return
        account, (place, functions) = self.account, self._place()
        if name in ("_to_copy", "copy_") and (hosts if on_device else ours):
            free = bool(kwargs.get("non_blocking")) or (name == "copy_" and len(args) > 2 and bool(args[2]))
            account.copied["to device" if on_device else "to host"] += given[-1].nbytes
            if not (free and on_device):
                account.waits[f"{place} copy to {'device' if on_device else 'host'}"] += 1
            return
        if name in _WAITS and ours:
            account.waits[f"{place} {name}"] += _WAITS[name]
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in masks):
            account.waits[f"{place} {name} by a mask"] += 1
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            account.waits[f"{place} {name}"] += 1
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        held = {tensor.elem.untyped_storage()._cdata for tensor in ours}
        view = not func._schema.is_mutable and bool(given) and all(m.untyped_storage()._cdata in held for m in made)
        if view or name in _NO_KERNEL or not (made or func._schema.is_mutable):
            return
        account.kernels[place] += 1
        account.parts[_part_of(functions, place)] += 1

    def _place(self) -> tuple[str, set[str]]:
        """The innermost line of the package on the stack, and all its functions and files there."""
        frame: FrameType | None = sys._getframe(1)
        here, known = "", set[str]()
        while frame is not None:
            _, package, name = frame.f_code.co_filename.rpartition(_PACKAGE)
            if f"{os.sep}transformers{os.sep}models{os.sep}" in frame.f_code.co_filename:
                known.add("transformers")
            if package and not name.endswith("launches.py"):
                known |= {frame.f_code.co_name, name}
                here = here or f"{name}:{frame.f_lineno}"
            frame = frame.f_back
        return here or "torch", known


class Played(Tensor):
    """A tensor of the played device: `elem` has its values on the CPU."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor, requires_grad: bool = False) -> "Played":
        made: Played = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        made.elem = elem
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Played({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _MODE.run(func, args, dict(kwargs or {}))


class _Backend(_DummyBackendModule):
    """What torch asks of a kind of device beside its kernels."""

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def device(self, index: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def set_device(self, index: int) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass


class _OneAttention(TorchFunctionMode):
    """Attention is one kernel, as on a GPU; `tolist` is one copy to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and isinstance(args[0], Played):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *args[:3],
                kwargs.get("dropout_p", 0.0),
                kwargs.get("is_causal", False),
                attn_mask=kwargs.get("attn_mask"),
                scale=kwargs.get("scale"),
            )[0]
        if func is Tensor.tolist and isinstance(args[0], Played):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


def _autocast(half: bool, call: Any) -> Any:
    """`call` as autocast makes it on a GPU: in bfloat16, or in float32. Nothing that was cast is kept."""
    given, wanted = (torch.float32, torch.bfloat16) if half else (torch.bfloat16, torch.float32)

    def cast(leaf: Any) -> Any:
        return leaf.to(wanted) if isinstance(leaf, Played) and leaf.dtype == given else leaf

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST)):
            return call(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


_setup_privateuseone_for_python_backend("played", _Backend())
_LIBRARIES = [torch.library.Library("_", "IMPL", "AutocastPrivateUse1"), torch.library.Library("aten", "IMPL")]
_LIBRARIES[0].fallback(torch.library.fallthrough_kernel)
# Of torch's lists for CUDA (AUTOCAST_FORALL_LOWER_PRECISION_FP and AUTOCAST_FORALL_FP32) those that networks call.
for _half, _names in (
    (True, "linear conv2d matmul mm bmm addmm baddbmm scaled_dot_product_attention _convolution"),
    (False, "layer_norm softmax.int log_softmax.int rsqrt exp log sum pow.Tensor_Scalar group_norm"),
):
    for _name in _names.split():
        _packet, _, _overload = _name.partition(".")
        _call = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
        _LIBRARIES[1].impl(_name, _autocast(_half, _call), "AutocastPrivateUse1")
torch._C._set_only_lift_cpu_tensors(True)  # a tensor made of Python numbers on the device is a copy
_foreach_utils._foreach_supported_types.append(Played)  # type: ignore[arg-type]
DEVICE = torch.device("played:0")
_MODE = PlayedDevice()


def count_launches(cfg: RunConfig, updates: int = 2) -> Launches:
    """What the last of some real updates of `cfg` asks of a device; random images, random weights."""
    base = random_student(cfg).train()
    networks = make_networks(cfg, base, stand_in_engine(cfg)).each(lambda _, network: _moved(network))
    memory = _moved(ClassMemory(len(cfg.classes), cfg.projector.dim))
    watch = _moved(Watch([100] * len(cfg.classes), cfg.uda.pseudo_threshold))
    assert isinstance(memory, ClassMemory)
    assert isinstance(watch, Watch)
    student: Any = networks.student
    halves = None
    if cfg.train.precision == "bf16":
        networks.each(lambda _, network: _with_autocast(network))
        halves = half_weights(cfg, networks)
    parts = Parts(networks, memory, make_optimizer(student.pretrained_encoder, student, cfg.optim), watch, halves)
    accelerator: Any = SimpleNamespace(
        device=DEVICE,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        trackers=[],
        backward=lambda loss: loss.backward(),
        init_trackers=lambda *_, **__: None,
        log=lambda *_, **__: None,
    )
    run = Run(cfg, accelerator, parts, METHODS[cfg.method], itertools.repeat(random_batch(cfg)))
    with (
        tempfile.TemporaryDirectory() as folder,
        _OneAttention(),
        _MODE,
        Tracker(accelerator, Path(folder), updates, Progress(), cfg.method, show=False) as tracker,
    ):
        for step in range(cfg.full_from, cfg.full_from + updates):
            _MODE.account, _MODE.counts = Launches(), True
            update(run, step, tracker)
            _MODE.counts = False
    return _MODE.account


def _split(tensors: Sequence[Tensor]) -> tuple[list[Played], list[Tensor]]:
    return [t for t in tensors if isinstance(t, Played)], [t for t in tensors if not isinstance(t, Played)]


def _unwrapped(leaf: Any) -> Any:
    return leaf.elem if isinstance(leaf, Played) else leaf


def _part_of(functions: set[str], place: str) -> str:
    if threading.current_thread() is not threading.main_thread() or "backward" in functions:
        return "backward"
    found = (part for part, marks in _PARTS if marks & functions)
    return next(found, "backward" if place == "torch" else "update")


def _with_autocast(network: nn.Module) -> nn.Module:
    """As accelerate prepares it."""
    network.forward = convert_outputs_to_fp32(torch.autocast(DEVICE.type, torch.bfloat16)(network.forward))
    return network


def _moved(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(Played(value.data.clone()), requires_grad=value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Played(buffer.clone())
    return module


def main(arguments: Sequence[str]) -> int:
    for recipe, *overrides in [arguments] if arguments[0] != "-" else json.load(sys.stdin):
        cfg = without_data(load_config(recipe, overrides))
        torch.manual_seed(0)
        print(json.dumps(vars(count_launches(config_of(cfg, cfg.method)))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

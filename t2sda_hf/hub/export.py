"""A model as ONNX, for any image size, compared with PyTorch before it is kept."""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..errors import Ended, NotFinite
from ..evaluation.inference import load_model

SIZES = ((2, 64, 96), (1, 97, 133), (3, 160, 64))  # (batch, height, width), one divisible by nothing
TOLERANCE = 1e-4


class Logits(nn.Module):
    """A model that returns its logits alone: ONNX knows no output classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values).logits
        return logits


@contextmanager
def any_size(encoder: Any) -> Iterator[None]:
    """Inside, the code of a backbone of transformers leaves open what the exporter has to leave open.

    Attention is written out: of torch's fused one the exporter cannot reshape the result. And `torch_int` would make a
    constant of a side that is a symbol.
    """
    attention, code = encoder.config._attn_implementation, sys.modules[type(encoder).__module__]
    encoder.set_attn_implementation("eager")
    try:
        with patch.object(code, "torch_int", _whole) if hasattr(code, "torch_int") else nullcontext():
            yield
    finally:
        encoder.set_attn_implementation(attention)


def _whole(side: Any) -> Any:
    return int(side) if isinstance(side, float) else side


@contextmanager
def named_operator(name: str) -> Iterator[None]:
    """Whatever the exporter or onnxruntime raises inside is a ValueError that names the operator where they stop."""
    try:
        yield
    except (Ended, OSError, MemoryError):
        raise
    except Exception as error:  # any: those of onnxruntime have no class in common
        found = re.search(r"torch\.ops\.(aten\.\w+)|while running (\w+) node", str(error))
        operator = next(filter(None, found.groups())) if found else type(error).__name__
        said = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(
            f"{name!r} cannot be exported for images of any size: ONNX stops at {operator} ({said})."
        ) from error


def export_onnx(name: str, path: Path) -> float:
    """Write a model with the input pixel_values (B,3,H,W), normalised, and the output logits (B,K,H/4,W/4).

    Args:
        name: folder or Hub id.
        path: file to write; its folder must exist.

    Returns:
        The largest difference of a logit between onnxruntime and PyTorch.

    Raises:
        NotFinite: if its logits are not.
        ValueError: if the model cannot be loaded or exported, naming the operator, a library is missing, or the file
            gives other logits.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it, and says so later)
    except ImportError as error:
        raise ValueError(
            "the export needs onnx, onnxscript and onnxruntime: pip install 't2sda_hf[export]'."
        ) from error
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}.")
    model, classes = load_model(name)
    if model.config.multi_resolution:
        raise ValueError(
            f"{name!r} sees images at two resolutions, in crops whose number depends on the size: no ONNX."
        )
    automatic = model.config.encoder == "backbone"
    if automatic and model.backbone.only_size is not None:
        only = "x".join(map(str, model.backbone.only_size))
        raise ValueError(f"{name!r} takes images of {only} alone, and an export is for any size: no ONNX.")
    logits = Logits(model).eval()
    with torch.no_grad():
        if not torch.isfinite(logits(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)))).all():
            raise NotFinite(
                f"the logits of {name!r} are NaN or infinite even for noise, so it was not exported. Its weights are "
                "damaged, or their training diverged: take an earlier checkpoint."
            )
    dynamic = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
    with TemporaryDirectory(dir=path.parent) as temporary:  # the same disk, so that renaming is one step
        draft = Path(temporary) / "model.onnx"
        with (
            warnings.catch_warnings(action="ignore"),  # of the exporter about its own code
            any_size(model.pretrained_encoder) if automatic else nullcontext(),
            named_operator(name),
        ):
            program = torch.onnx.export(
                logits,
                (torch.zeros(2, 3, 64, 96),),  # two images: with one the batch would become a constant
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes=dynamic,
                dynamo=True,
                verbose=False,
            )
        assert program is not None  # with dynamo=True it is none
        program.model.metadata_props["classes"] = ", ".join(classes)
        program.save(draft)
        session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])
        worst = 0.0
        for index, (batch, height, width) in enumerate(SIZES):
            pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(index))
            with torch.no_grad():
                expected = logits(pixels)
            with named_operator(name):
                found = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
            if found.shape != expected.shape:
                raise ValueError(f"the exported model gives {tuple(found.shape)} instead of {tuple(expected.shape)}.")
            worst = max(worst, float((found - expected).abs().max()))
        if not worst <= TOLERANCE:
            raise ValueError(f"the exported model differs by {worst:.1e}, more than {TOLERANCE:.0e}; it was not kept.")
        draft.replace(path)
    return worst

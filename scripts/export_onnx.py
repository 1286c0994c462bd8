"""Write a model as ONNX, for any image size: python scripts/export_onnx.py outputs/demo/t2sda/student model.onnx

Input pixel_values (batch, 3, height, width), normalised; output logits (batch, classes, height/4, width/4). The file is
checked with onnxruntime on three sizes before it gets its name. Needs pip install "t2sda_hf[export]".
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from t2sda_hf.evaluation.inference import load_model
from t2sda_hf.masking import run_masked

SIZES = ((2, 64, 96), (1, 97, 133), (3, 160, 64))  # (batch, height, width), one divisible by nothing
TOLERANCE = 1e-4


class Logits(nn.Module):
    """A model that returns its logits alone: ONNX knows no output classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


def export(name: str, path: Path) -> float:
    """Write `path`; returns the largest difference of a logit between onnxruntime and PyTorch.

    Raises:
        ValueError: if the model cannot be loaded or the file gives other logits.
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
    logits = Logits(model).eval()
    dynamic = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
    with TemporaryDirectory(dir=path.parent) as temporary:  # the same disk, so that renaming is one step
        draft = Path(temporary) / "model.onnx"
        # Two images: with one the batch would become a constant.
        program = torch.onnx.export(
            logits,
            (torch.zeros(2, 3, 64, 96),),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=dynamic,
            dynamo=True,
            verbose=False,
        )
        program.model.metadata_props["classes"] = ", ".join(classes)
        program.save(draft)
        session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])
        worst = 0.0
        for index, (batch, height, width) in enumerate(SIZES):
            pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(index))
            with torch.no_grad():
                expected = logits(pixels)
            found = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
            if found.shape != expected.shape:
                raise ValueError(f"the exported model gives {tuple(found.shape)} instead of {tuple(expected.shape)}.")
            worst = max(worst, float((found - expected).abs().max()))
        if not worst <= TOLERANCE:
            raise ValueError(f"the exported model differs by {worst:.1e}, more than {TOLERANCE:.0e}; it was not kept.")
        draft.replace(path)
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("output", type=Path, metavar="FILE.onnx")
    args = parser.parse_args(arguments)
    try:
        worst = export(args.model, args.output)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: equal to PyTorch within {worst:.1e} on {len(SIZES)} sizes.")
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))

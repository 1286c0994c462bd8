"""Write a model as an ONNX file that takes images of any size.

    t2sda export outputs/demo model.onnx          the student that the run has adapted
    t2sda export USER/streets-t2sda model.onnx

The input is pixel_values (batch, 3, height, width), normalised. The output is logits (batch, classes, height/4,
width/4). The file is checked with onnxruntime on three sizes, and only then gets its name. The command needs
pip install "t2sda_hf[export]".
"""

from argparse import Namespace

from ..evaluation.models import model_of
from ..hub.export import SIZES, export_onnx
from ..storage import outputs


def run(args: Namespace) -> int:
    with outputs("export", args.output):
        worst = export_onnx(model_of(args.model), args.output)
    print(f"{args.output}: equal to PyTorch within {worst:.1e} on {len(SIZES)} sizes.")
    return 0

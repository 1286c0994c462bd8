"""Needs the extra `export`."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import FAMILIES
from safetensors.torch import load_file, save_file

from t2sda_hf.cli import main
from t2sda_hf.evaluation.inference import load_model
from t2sda_hf.hub.export import TOLERANCE, export_onnx, named_operator
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `export`")


def test_the_file_gives_the_model_s_logits_at_sizes_that_the_export_never_saw(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, path = finished_run / "t2sda" / "student", tmp_path / "model.onnx"
    assert main(["export", str(student), str(path)]) == 0
    model, classes = load_model(str(student))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["classes"] == ", ".join(classes)
    for shape in ((1, 3, 48, 80), (3, 3, 101, 67), (1, 3, 200, 33)):
        pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels)).logits.numpy()
        np.testing.assert_allclose(session.run(None, {"pixel_values": pixels})[0], expected, atol=1e-4)
    assert set(tmp_path.iterdir()) == {path, tmp_path / ".t2sda.json"}  # no draft is left


def test_what_cannot_be_exported_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "model.onnx")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_not_exported(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(finished_run / "t2sda" / "student", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights |= {name: torch.full_like(one, 1e30) for name, one in weights.items() if one.is_floating_point()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(model), str(tmp_path / "model.onnx")]) == 1
    assert re.search(r"NotFinite: the logits of .*model' are NaN or infinite", capsys.readouterr().err)
    assert not (tmp_path / "model.onnx").exists()


def write_model(family: str, folder: Path) -> str:
    """A model on a tiny encoder, with a head that adds little to the time of an export."""
    torch.manual_seed(0)
    names = {index: f"class {index}" for index in range(5)}
    sizes = {"head": "linear", "projector_dim": 8, "projector_hidden": 8}
    T2SDAForSemanticSegmentation(
        T2SDAConfig(backbone_config=FAMILIES[family], id2label=names, **sizes)
    ).save_pretrained(folder)
    T2SDAImageProcessor().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["dinov2", "convnext"])
def test_an_encoder_of_transformers_is_exported_for_any_size(family: str, tmp_path: Path) -> None:
    """One with a table of positions and a patch that divides no level, and one with strides of its own."""
    assert export_onnx(write_model(family, tmp_path / "model"), tmp_path / "model.onnx") <= TOLERANCE


def test_an_encoder_of_one_size_is_not_exported_for_any(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes images of 64x64 alone, and an export is for any size"):
        export_onnx(write_model("hiera", tmp_path / "model"), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("said", "operator"),
    [
        ("%view_45 : call_function[target=torch.ops.aten.view.default](args = ())", "aten.view"),
        ("Non-zero status code returned while running Reshape node. Name:'node_view_16'", "Reshape"),
        ("something else", "RuntimeError"),
    ],
)
def test_the_operator_that_stops_an_export_is_named(said: str, operator: str) -> None:
    with (
        pytest.raises(
            ValueError, match=rf"'swin' cannot be exported for images of any size: ONNX stops at {operator} "
        ),
        named_operator("swin"),
    ):
        raise RuntimeError(said)

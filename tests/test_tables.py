"""The paper's Tables 2 to 17: every row that is not quoted trains two steps, and the tables say what they should."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from test_scripts import load_script
from test_two_processes import ROOT
from transformers import SegformerConfig, SegformerModel

from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.training.build import Domains, build_student, open_domains, run_method
from t2sda_hf.training.resume import Start
from t2sda_hf.training.stopping import StopRequest
from t2sda_hf.translate import build_engine
from t2sda_hf.translate.generator import TranslationGenerator, save_translator

ablation = load_script("run_ablation")
TABLES = sorted((ROOT / "configs" / "ablations").rglob("*.yaml"))
SIZES = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
# What makes a run of the paper small. Nothing here is a key that a row of a table changes.
TINY = [
    "--source={path: streets-source, split: train, num_images: 3, resize: [96, 160], resize_mode: exact}",
    "--test={path: streets-target, split: validation, num_images: 1, resize: [64, 128], resize_mode: exact}",
    f"--model.depths={SIZES['depths']}",
    f"--model.hidden_sizes={SIZES['hidden_sizes']}",
    f"--model.num_attention_heads={SIZES['num_attention_heads']}",
    "--model.decoder_hidden_size=8",
    "--projector={hidden: 8, dim: 8}",
    "--data={crop_size: [64, 64], outer_crop_size: [64, 128]}",
    "--hrda.crop_size=[32, 32]",
    "--rcs.min_pixels=5",
    "--patch_mask.block_size=16",
    "--train={max_steps: 2, batch_size: 1, log_every: 1, log_with: []}",
    "--optim.warmup_steps=0",
]
MARGINS = "--uda={ignore_top: 1, ignore_bottom: 2}"
TARGET = "--target={path: streets-target, split: train, num_images: 2, resize: [64, 128], resize_mode: exact}"


def rows() -> list[tuple[str, int]]:
    found = []
    for path in TABLES:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["rows"]
        found += [(path.stem, number) for number, entry in enumerate(entries) if not entry.get("quoted")]
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained encoder and a trained translator, so that feature distance and Table 11 find what they need."""
    folder = tmp_path_factory.mktemp("tables")
    torch.manual_seed(0)
    SegformerModel(SegformerConfig(**SIZES)).save_pretrained(folder / "encoder")
    save_translator(folder / "translator", TranslationGenerator(4, 1), {"width": 4, "num_blocks": 1})
    return folder


def tiny(table: str, number: int, files: Path) -> RunConfig:
    """The row's config, made small."""
    row = ablation.read_table(table, "paper").rows[number]
    given = ablation.config_of(row)
    own = [f"--output_dir={files / 'out'}", MARGINS]
    if given.method != "generalization":
        own.append(TARGET)
    if given.model.size.startswith("resnet"):
        own += ["--model.pretrained=null", "--loss_weights.feature_distance=0", "--projector.in_index=[3]"]
        own += ["--model.hidden_sizes=[8, 16, 16, 16]"]
    else:
        own.append(f"--model.pretrained={files / 'encoder'}")
    if given.evaluation.mode == "slide":
        own += ["--evaluation.window=[64, 64]", "--evaluation.stride=[32, 32]"]
    if given.translate.engine == "trained":
        own.append(f"--translate.trained.model={files / 'translator'}")
    return load_config(row.config, [*row.arguments, *TINY, *own])


@pytest.fixture(scope="module")
def domains(files: Path) -> Domains:
    return open_domains(tiny("table07", 5, files), Accelerator(cpu=True))


def test_all_tables_are_there() -> None:
    assert [path.stem for path in TABLES] == [f"table{number:02d}" for number in range(2, 18)]
    print(len(rows()))


@pytest.mark.parametrize(("table", "number"), rows(), ids=lambda value: str(value))
def test_a_row_trains_two_steps(table: str, number: int, files: Path, domains: Domains, tmp_path: Path) -> None:
    cfg = tiny(table, number, files)
    own = replace(
        domains,
        target=None if cfg.method == "generalization" else domains.target,
        translate=build_engine(cfg.translate),
    )
    accelerator = Accelerator(cpu=True)
    results = run_method(
        cfg, build_student(cfg), own, accelerator, tmp_path, start=Start(), record={}, stop=StopRequest()
    )
    steps = [json.loads(line) for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "lr" in line][:2] == [1, 2]
    assert results["student"]["num_images"] == 1

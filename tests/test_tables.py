"""The paper's Tables 2 to 17: every row that is not quoted trains two steps, and the tables say what they should."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from running import ROOT
from transformers import SegformerConfig, SegformerModel

from t2sda_hf import T2SDAForSemanticSegmentation
from t2sda_hf.cli import parser_of
from t2sda_hf.commands import tables
from t2sda_hf.config import RunConfig, differences, load_config
from t2sda_hf.data.layouts import LAYOUTS
from t2sda_hf.training.build import Domains, build_student, open_domains, run_method
from t2sda_hf.training.resume import Start
from t2sda_hf.training.stopping import StopRequest
from t2sda_hf.translate import build_engine
from t2sda_hf.translate.generator import TranslationGenerator, save_translator

TABLES = sorted((ROOT / "configs" / "ablations").glob("table*.yaml"))
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


@cache
def table_at(name: str, scale: str = "paper"):
    return tables.read_table(name, scale)


@cache
def cell_folder(table: str, number: int) -> Path:
    """The name of a row's run, the same for rows that are the same run."""
    return tables.cell_of(table_at(table).rows[number], 0, Path()).folder


@cache
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
    row = table_at(table).rows[number]
    given = row.cfg
    own = [f"--output_dir={files / 'out'}", MARGINS]
    if given.method != "generalization":
        own.append(TARGET)
    if given.model.size.startswith("resnet"):
        own += ["--model.pretrained=null", "--loss_weights.feature_distance=0"]
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


@pytest.fixture(scope="module")
def finished() -> dict[Path, dict]:
    """Results by cell: rows that are the same run in several tables are run once, as t2sda tables does."""
    return {}


def test_all_tables_are_there() -> None:
    assert [path.stem for path in TABLES] == [f"table{number:02d}" for number in range(2, 18)]


def test_the_rows_that_are_run_are_counted() -> None:
    """Rows by table, and the distinct runs behind them at the paper's scale."""
    count = {path.stem: sum(table == path.stem for table, _ in rows()) for path in TABLES}
    assert list(count.values()) == [4, 9, 4, 9, 2, 8, 4, 3, 6, 11, 4, 4, 4, 3, 5, 3]
    cells = {row: cell_folder(*row) for row in rows()}
    assert (len(cells), len(set(cells.values()))) == (83, 64)
    ablations = {cell for (table, _), cell in cells.items() if 7 <= int(table[-2:]) <= 16}
    assert len(ablations) == 40  # trainings per seed for all of the paper's ablations (method 5.14)


def test_the_table_of_encoders_trains_each_of_them_in_three_ways() -> None:
    table = table_at("encoders")
    made = [row for row in table.rows if row.cfg is not None]
    encoders = {row.label[0]: (row.cfg.model.size, row.cfg.model.pretrained) for row in made}
    assert list(encoders) == ["MiT-B5", "DINOv2-B", "DINOv2-L", "DINOv3-L", "ConvNeXt-L", "Swin-L"]
    assert len({tables.cell_of(row, 0, Path()).folder for row in made}) == len(made) == 18
    for first, second, third in zip(*[iter(made)] * 3, strict=True):
        assert (first.cfg.method, second.cfg.method, third.cfg.method) == ("source_only", "t2sda", "t2sda")
        assert (second.cfg.loss_weights.pull, third.cfg.loss_weights.pull) == (0, 0.1)
        assert len({row.cfg.model for row in (first, second, third)}) == 1
        assert second.cfg.loss_weights.masked_consistency == third.cfg.loss_weights.masked_consistency == 1


def test_no_row_has_lost_its_cell() -> None:
    """cells.json holds the numbers of the rows at every scale, of the first release: finished runs lie under them."""
    for name, numbers in json.loads((ROOT / "tests" / "cells.json").read_text(encoding="utf-8")).items():
        made = [row for row in table_at(*name.split()).rows if row.config is not None]
        assert [tables.cell_of(row, 0, Path()).folder.parts[0] for row in made] == numbers, name


@pytest.mark.parametrize(("table", "number"), rows(), ids=lambda value: str(value))
def test_a_row_trains_two_steps(
    table: str, number: int, files: Path, domains: Domains, finished: dict[Path, dict], tmp_path: Path
) -> None:
    cfg = tiny(table, number, files)
    cell = cell_folder(table, number)
    if cell not in finished:
        own = replace(
            domains,
            target=None if cfg.method == "generalization" else domains.target,
            translate=build_engine(cfg.translate),
        )
        student, accelerator = build_student(cfg), Accelerator(cpu=True)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        results = run_method(cfg, student, own, accelerator, tmp_path, start=Start(), record={}, stop=StopRequest())
        logged = [json.loads(line) for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged if "lr" in line] == [1, 2]
        after = T2SDAForSemanticSegmentation.from_pretrained(tmp_path / "student").state_dict()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        finished[cell] = results | {"moved": moved, "losses": set(logged[0])}
    found, weights = finished[cell], cfg.loss_weights
    assert found["student"]["num_images"] == 1
    assert {"source"} <= found["losses"]
    assert ("pull" in found["losses"]) == (cfg.method != "source_only" and weights.pull > 0)
    assert ("target" in found["losses"]) == (cfg.method == "t2sda")
    assert ("masked_consistency" in found["losses"]) == (cfg.method == "t2sda" and weights.masked_consistency > 0)
    assert any(name.startswith("decode_head") for name in found["moved"])


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_domain_at_the_papers_scale_has_the_split_that_is_read(path: Path) -> None:
    """A table must not find out after a week of training that what it is scored on is not there."""
    table = table_at(path.stem)
    if table.evaluate:
        arguments = parser_of("evaluate").read(["model", *table.evaluate])
        (domain,) = arguments.domain
        layout = LAYOUTS[Path(domain).name.removesuffix("_full")]  # the same without --size
        assert load_config(None, arguments.overrides).test.split in layout.splits
    for row in table.rows:
        if row.config is None:
            continue
        cfg = row.cfg
        for given in (cfg.source, cfg.target, cfg.test):
            assert not given.path or given.split in LAYOUTS[Path(given.path).name].splits


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_row_is_a_valid_config_at_every_scale_and_changes_what_it_names(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["table"] == int(path.stem.removeprefix("table"))
    assert content["question"].endswith("?")
    for scale in content["base"]:
        table = table_at(path.stem, scale)
        for row, entry in zip(table.rows, content["rows"], strict=True):
            assert len(row.label) == len(table.labels)
            assert len(row.paper) == len(table.scores)
            assert all(mean is None or 30 < mean < 90 for mean, _ in row.paper)
            if row.config is None:
                continue
            named = entry["set"] | entry.get("set_at", {}).get(scale, {})
            different = differences(asdict(load_config(row.config)), asdict(row.cfg))
            assert set(different) - {"baseline"} <= set(named)


def test_figures_of_the_paper_agree_between_tables() -> None:
    """The paper's main run and its baselines stand in many tables."""
    quoted: dict[Path, dict[str, set]] = {}
    for table, number in rows():
        content = table_at(table)
        row = content.rows[number]
        if content.evaluate:
            continue
        cell = cell_folder(table, number)
        for score, (mean, _) in zip(content.scores, row.paper, strict=True):
            quoted.setdefault(cell, {}).setdefault(score, set()).add(mean)
    shared = [scores["mIoU"] for scores in quoted.values() if "mIoU" in scores]
    assert all(len(means) == 1 for means in shared), shared
    assert {70.0} in shared
    assert {68.3} in shared

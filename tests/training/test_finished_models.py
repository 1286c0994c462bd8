"""Runs that begin with a finished model, source-free or distilled: what they start from, stops, collapse, refusals."""

import json
from pathlib import Path

import pytest
import torch
from faults.arena import RUN, outcome
from running import stopped_before, undrawn
from safetensors.torch import load_file
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from t2sda_hf.cli import main
from t2sda_hf.config import load_config
from t2sda_hf.evaluation.inference import load_model
from t2sda_hf.evaluation.watch import Watch
from t2sda_hf.training import loop
from t2sda_hf.training.build import build_student

CLASSES = ["road", "sidewalk", "building", "pole", "traffic sign", "vegetation", "sky", "person", "car", "bus"]
FREE = [
    "--method=source_free",
    '--source.path=""',
    "--balance.labelled=none",
    "--pull={query_domain: target, proto_momentum: 0}",
    "--uda.weight_scope=class",
    "--train={batch_size: 2, evaluate_every: 3}",
    "--select=proxy:combined",
]


def segformer(folder: Path, names: list[str], seed: int = 0) -> str:
    """A plain SegFormer of somebody else, tiny and untrained."""
    torch.manual_seed(seed)
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = SegformerForSemanticSegmentation(config)
    model.decode_head.classifier.weight.data *= 30  # so that it predicts more than one class
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`t2sda train` of a source-free run from such a model, but for --output_dir."""
    undrawn(monkeypatch)
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    start = segformer(tmp_path / "start", CLASSES)
    return ["train", "--config", str(tmp_path / "run.yaml"), *FREE, f"--start_model={start}"]


def test_it_starts_as_the_model_it_is_given_with_classes_matched_by_name(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    start = segformer(tmp_path / "start", ["cow", *CLASSES[::-1]])
    cfg = load_config(tmp_path / "run.yaml", [*FREE, f"--start_model={start}"])
    student, (theirs, names) = build_student(cfg).eval(), load_model(start)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, given = student(images).logits, theirs(images).logits
    torch.testing.assert_close(own, given[:, [names.index(name) for name in CLASSES]])
    assert [student.config.id2label[index] for index in range(10)] == CLASSES


def test_a_run_that_was_stopped_ends_where_another_ends(words, tmp_path, monkeypatch):
    anchored = [*words, "--loss_weights.anchor=0.01"]
    assert main([*anchored, "--output_dir", str(tmp_path / "whole")]) == 0
    stopped_before(monkeypatch, 8)
    cut = [*anchored, "--output_dir", str(tmp_path / "cut"), "--resume", "auto"]
    assert [main(cut), main(cut)] == [143, 0]
    assert outcome(tmp_path / "cut", "source_free") == outcome(tmp_path / "whole", "source_free")
    metrics = json.loads((tmp_path / "cut" / "source_free" / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == {"student", "teacher", "selected", "start"}
    read = json.loads((tmp_path / "cut" / "data.json").read_text(encoding="utf-8"))
    assert set(read["domains"]) == {"target", "test"}
    changed = segformer(tmp_path / "other", CLASSES, seed=1)
    assert main([*cut, "--start_model", changed]) == 2  # other weights under another path; the same would be none


def test_it_stops_when_the_proxy_falls_and_keeps_the_best(words, tmp_path, monkeypatch, capsys):
    read, values = Watch.read, {3: 0.5, 6: 0.4, 9: 0.3}
    done = [0]

    def planted(watch, sum_over_processes):
        return read(watch, sum_over_processes) | {"combined": values[done[0]]}

    observe = loop.observe

    def counted(run, step, *rest):
        done[0] = step
        observe(run, step, *rest)

    monkeypatch.setattr(Watch, "read", planted)
    monkeypatch.setattr(loop, "observe", counted)
    out = tmp_path / "out"
    guarded = [*words, "--train.stop_after_falls=2", "--output_dir", str(out)]
    assert main(guarded) == 0
    printed = capsys.readouterr().out
    assert "Stopped after 9 of 12 updates, because proxy:combined had fallen in 2 evaluations in a row" in printed
    assert "Selected without target labels by combined: the student after 3 updates." in printed
    assert json.loads((out / "source_free" / "selected" / "selected.json").read_text()) == {
        "proxy": "combined",
        "value": 0.5,
        "step": 3,
    }
    scores = (out / "source_free" / "metrics.json").read_bytes()
    weights = load_file(out / "source_free" / "student" / "model.safetensors")
    assert main([*guarded, "--resume", "auto"]) == 0  # it does not go on where it was stopped
    assert (out / "source_free" / "metrics.json").read_bytes() == scores
    again = load_file(out / "source_free" / "student" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_a_student_is_distilled_and_a_stop_in_between_changes_nothing(words, tmp_path, monkeypatch, capsys):
    larger = words[-1]
    distil = [*words[:3], "--method=distil", larger, "--train.evaluate_every=3"]
    assert main([*distil, "--output_dir", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    assert "student: 0.0" in printed
    assert "start: 0.0" in printed
    assert "million parameters" in printed
    stopped_before(monkeypatch, 8)
    cut = [*distil, "--output_dir", str(tmp_path / "cut"), "--resume", "auto"]
    assert [main(cut), main(cut)] == [143, 0]
    assert outcome(tmp_path / "cut", "distil") == outcome(tmp_path / "whole", "distil")
    metrics = json.loads((tmp_path / "cut" / "distil" / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == {"student", "teacher", "student_source", "teacher_source", "start"}
    assert main([*cut, f"--start_model={segformer(tmp_path / 'other', CLASSES, seed=1)}"]) == 2  # another teacher


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--source.path=streets-source"],
            "must be empty with method source_free: it learns without labels. Set method",
        ),
        (["--target_labels=2"], "must be empty with method source_free: it learns without labels"),
        (['--start_model=""'], "start_model must be the folder or Hub id of a finished model with method source_free"),
        (["--start_model=nowhere"], "nowhere"),
        (["--baseline=source_only"], "baseline must be none with method source_free, which has no source"),
        (["--train.batch_size=1"], "train.batch_size must be at least 2 with method source_free"),
        (["--pull.query_domain=ptarget"], "must be target, source and 0 with method source_free"),
        (["--classes=[road, sky, cow]"], "and not cow. Set classes to some of those that it knows, under their names"),
        (["--hrda.enabled=true", "--data={crop_size: [64, 64]}"], "hrda.enabled must be false, as in start_model"),
        (["--method=distil", '--start_model=""'], "must be a finished model and false with method distil"),
        (["--train.stop_after_falls=2", "--select=last"], "train.stop_after_falls must be 0 with select last"),
        (["--method=target_only"], "start_model must be empty with method target_only"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(words, tmp_path, capsys, more, said):
    assert main([*words, "--output_dir", str(tmp_path / "out"), *more]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()

"""Domain generalisation: L_source + λ·L_pull, without a single target image (method 5.12)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from reference import pull as slow
from reference.samples import listed
from running import TINY_NETWORK, unpainted
from tiny import CLASSES, tiny_batch, tiny_config, tiny_graphs, tiny_networks, together
from torch import Generator, Tensor

from t2sda_hf.augment.color import photometric_distortion
from t2sda_hf.batch import normalize
from t2sda_hf.cli import main
from t2sda_hf.config import RunConfig
from t2sda_hf.data import domains
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.methods import METHODS, generalization_losses
from t2sda_hf.training.build import open_domains

K = len(CLASSES)
CALM = "--model={head_dropout: 0, drop_path_rate: 0}"
DG = ["--method=generalization", "--translate.engine=color_jitter", "--drw.apply_to=none", CALM]


def config(*overrides: str) -> RunConfig:
    return tiny_config(*DG, *overrides)


def batch_of(cfg: RunConfig):
    empty = {"target_images": None, "outer_source": None, "style_reference": None, "inner_corner": None}
    return replace(tiny_batch(cfg), **empty)


def losses(cfg: RunConfig, seed: int = 0, networks=None, batch=None) -> dict[str, Tensor]:
    return together(tiny_graphs(cfg, networks, batch or batch_of(cfg), seed=seed))[0]


def test_source_is_supervised_training_on_distorted_images():
    cfg = config()
    images = photometric_distortion(batch_of(cfg).source_images, Generator().manual_seed(3))
    expected = segmentation_loss(tiny_networks(cfg).student(normalize(images)).logits, batch_of(cfg).source_labels)
    terms = losses(cfg, seed=3)
    assert list(terms) == ["source", "pull"]
    assert terms["source"].item() == pytest.approx(expected.item(), rel=1e-6)
    baseline = losses(config("--loss_weights.pull=0"), seed=3)  # the same run as source_only
    assert list(baseline) == ["source"]
    assert torch.equal(baseline["source"], terms["source"])


@pytest.mark.parametrize("overrides", [[], ["--pull.objective=mse"], ["--pull.negatives=pooled"]])
def test_pull_equals_the_twin_with_source_negatives_and_equal_weights(overrides):
    cfg = config(*overrides)
    networks, batch = tiny_networks(cfg), batch_of(cfg)
    styled: list[Tensor] = []

    def engine(source: Tensor, style: Tensor | None, generator: Generator) -> Tensor:
        assert style is None
        styled.append(source)
        return 1 - source

    found, seen = together(tiny_graphs(cfg, replace(networks, translate=engine), batch))
    assert torch.equal(styled[0], batch.source_images)  # the scene itself, not the distorted one
    samples = listed(seen["samples"])
    torch.testing.assert_close(seen["class_weights"], torch.full((K,), 1 / K))
    labels = batch.source_labels[:, ::4, ::4]
    keys = networks.teacher(normalize(batch.source_images), project=True).embeddings.double()
    with torch.no_grad():
        queries = networks.student(normalize(1 - batch.source_images), project=True, segment=False).embeddings
    rows, negatives = {}, {}
    for class_id, picked, from_source, from_target in zip(*vars(samples).values(), strict=True):
        assert from_target.numel() == 0
        assert from_source.numel() == cfg.pull.num_negatives  # all m of them
        assert set(from_source.tolist()) <= slow.source_negatives(labels, class_id)
        rows[class_id] = picked.tolist()
        negatives[class_id] = [(from_source.tolist(), [])] * len(picked)
    prototypes = torch.zeros(K, cfg.projector.dim, dtype=torch.float64)
    for class_id in samples.classes:
        prototypes[class_id] = slow.prototype(keys, labels, class_id)
    twin = slow.pull_loss(
        queries.double(),
        keys,
        torch.zeros_like(keys),
        prototypes,
        rows,
        negatives,
        [1 / K] * K,
        cfg.pull.temperature,
        cfg.pull.objective,
        cfg.pull.reduction,
        K,
    )
    assert found["pull"].item() == pytest.approx(twin.item(), rel=2e-4)


def test_the_pull_trains_encoder_and_projector_alone():
    cfg = config("--loss_weights.source=0")
    networks = tiny_networks(cfg)
    losses(cfg, networks=networks)["pull"].backward()
    reached = {
        name: any(p.grad is not None and p.grad.any() for p in part.parameters())
        for name, part in networks.student.named_children()
    }
    assert reached == {"segformer": True, "decode_head": False, "projector": True}
    assert all(parameter.grad is None for parameter in networks.teacher.parameters())


def test_it_is_a_function_of_the_generator_and_a_target_in_the_batch_changes_nothing():
    cfg = config()
    first, second = losses(cfg, 1), losses(cfg, 1, batch=tiny_batch(cfg))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(cfg, 2)["pull"] != first["pull"]


def test_feature_distance_is_there_for_who_wants_it():
    cfg = config(
        "--model.pretrained=some encoder", "--loss_weights.feature_distance=0.005", "--feature_distance.classes=[]"
    )
    assert list(losses(cfg)) == ["source", "feature_distance", "pull"]


@pytest.mark.parametrize(("scale", "side"), [("context", 32), ("full", 64)])
def test_hrda_restyles_the_context_unless_told_otherwise(scale, side):
    cfg = config(
        "--hrda={enabled: true, crop_size: [32, 32]}",
        "--data={crop_size: [64, 64], outer_crop_size: [96, 96]}",
        f"--translate.hrda_scale={scale}",
    )
    networks, sizes = tiny_networks(cfg), []
    counted = replace(networks, translate=lambda source, style, generator: sizes.append(source.shape[-2:]) or source)
    terms = losses(cfg, networks=counted)
    assert sizes == [torch.Size([side, side])]
    assert all(torch.isfinite(value) for value in terms.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--target.path=streets-target", r"target\.path must be empty .* Set method t2sda"),
        ("--translate.engine=fda", r"translate\.engine must be none of fda, trained"),
        ("--translate={engine: trained, trained: {model: x}}", r"translate\.engine must be none of fda, trained"),
        ("--drw.apply_to=pull", r"drw\.apply_to must be none"),
        ("--drw.apply_to=target", r"drw\.apply_to must be none"),
        ("--pull.query_domain=target", "must be source or ptarget"),
        ("--pull.key_domain=target", "must be source or ptarget"),
    ],
)
def test_what_needs_a_target_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config(change)


def test_no_target_is_opened(monkeypatch):
    opened = []
    load_domain = domains.load_domain
    monkeypatch.setattr(
        domains, "load_domain", lambda given, *a, **k: opened.append(given.path) or load_domain(given, *a, **k)
    )
    cfg = config(
        "--source={path: streets-source, num_images: 2}",
        "--test={path: streets-target, split: validation, num_images: 1}",
    )
    assert open_domains(cfg, Accelerator(cpu=True)).target is None
    assert opened == ["streets-source", "streets-target"]  # the second is the test domain


def test_a_run_end_to_end(tmp_path: Path, capsys, monkeypatch):
    unpainted(monkeypatch)
    (tmp_path / "run.yaml").write_text(
        TINY_NETWORK
        + """
method: generalization
baseline: source_only
classes: [road, sidewalk, building, sky, car]
source: {path: streets-source, num_images: 4}
test: {path: streets-target, split: validation, num_images: 2}
data: {crop_size: [32, 64], outer_crop_size: [64, 96], cat_max_ratio: 0.9}
uda: {ignore_top: 0, ignore_bottom: 0}
translate: {engine: style, style: {styles: [weather, cartoon]}}
drw: {apply_to: none}
loss_weights: {feature_distance: 0}
train: {max_steps: 2, batch_size: 2, log_every: 1, log_with: []}
"""
    )
    out = tmp_path / "out"
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(out)]) == 0
    assert "generalization (teacher)" in capsys.readouterr().out
    assert (out / "generalization" / "student" / "model.safetensors").is_file()
    scalars = (out / "generalization" / "scalars.jsonl").read_text()
    assert '"pull"' in scalars
    assert '"target"' not in scalars


def test_it_is_known_by_name():
    assert METHODS["generalization"] is generalization_losses

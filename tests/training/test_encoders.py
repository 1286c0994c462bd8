"""Every family of backbones in training: two updates, what learns, the files, and predictions at odd sizes."""

import itertools
import sys
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from encoders import FAMILIES, ONE_SIZE, automatic, write_encoder
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from transformers import AutoBackbone

from t2sda_hf.cli import main
from t2sda_hf.commands.evaluate import models_of
from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.config.run import OptimConfig
from t2sda_hf.evaluation.inference import load_model, predict_labels
from t2sda_hf.methods import METHODS
from t2sda_hf.models import T2SDAForSemanticSegmentation, T2SDAImageProcessor
from t2sda_hf.teacher import with_statistics_of
from t2sda_hf.training.adapters import limit_training, merged
from t2sda_hf.training.build import build_student, compile_networks
from t2sda_hf.training.checkpoint import Progress, checkpoint_folder, optimizer_tensors
from t2sda_hf.training.derive import without_data
from t2sda_hf.training.estimate import random_batch, stand_in_engine
from t2sda_hf.training.loop import Run, learn, next_step, update
from t2sda_hf.training.optim import blocks_of, layer_scales, make_optimizer
from t2sda_hf.training.parts import make_parts
from t2sda_hf.training.resume import load_run
from t2sda_hf.training.store import Store
from t2sda_hf.training.tracking import Tracker

# What the maps do not pass: a token of masked pretraining, and norms after the last stage. Nothing else.
UNUSED = {
    "swin": {"swin.layernorm.weight", "swin.layernorm.bias"},
    "focalnet": {"focalnet.layernorm.weight", "focalnet.layernorm.bias"},
    "bit": {"bit.norm.weight", "bit.norm.bias"},
    "dinov2": {"embeddings.mask_token"},
    "dinov2_with_registers": {"embeddings.mask_token"},
    "dinov3_vit": {"embeddings.mask_token"},
}


def started(cfg: RunConfig) -> Run:
    accelerator = Accelerator(cpu=True)
    parts = make_parts(cfg, build_student(cfg).train(), stand_in_engine(cfg), accelerator)
    return Run(cfg, accelerator, parts, METHODS[cfg.method], itertools.repeat(random_batch(cfg)))


def make_updates(run: Run, folder: Path, first: int = 0, updates: int = 2) -> None:
    with Tracker(run.accelerator, folder, updates, Progress(), run.cfg.method, show=False) as tracker:
        for step in range(first, first + updates):
            update(run, step, tracker)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_updates_and_the_model_that_is_left(family, tmp_path):
    folder = write_encoder(family, tmp_path / "encoder")
    size = ["--data={crop_size: [64, 64], outer_crop_size: [64, 96]}"] if family in ONE_SIZE else []
    cfg = automatic(folder, *size, "--loss_weights={masked_consistency: 1, feature_distance: 0.1}")
    run = started(cfg)
    student: Any = run.parts.networks.student
    logged: list[dict[str, torch.Tensor]] = []
    learn(run, next_step(run, 0, 0, random_batch(cfg)), logged)
    assert {"source", "target", "pull", "masked_consistency", "feature_distance"} <= {n for t in logged for n in t}
    still = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {f"backbone.model.{name}" for name in UNUSED.get(family, ())}
    assert not any(p.requires_grad for p in run.parts.networks.teacher.parameters())
    run.parts.optimizer.zero_grad()
    make_updates(run, tmp_path)

    assert all(torch.isfinite(p).all() for p in student.parameters())
    student.save_pretrained(tmp_path / "student")
    T2SDAImageProcessor().save_pretrained(tmp_path / "student")
    loaded, _ = load_model(str(tmp_path / "student"))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in student.state_dict().items())
    for height, width in [(64, 64)] if family in ONE_SIZE else [(75, 131), (33, 40), (1, 1)]:
        images = torch.randn(1, 3, height, width)
        labels = predict_labels(loaded, images, (height, width))
        assert labels.shape == (1, height, width)
        slide = predict_labels(loaded, images, (height, width), "slide", (height, width), (height, width))
        assert torch.equal(slide, labels)  # one window is the image
    window, step = ((64, 64), (32, 32)) if family in ONE_SIZE else ((50, 60), (33, 40))
    assert predict_labels(loaded, torch.randn(1, 3, 96, 128), (96, 128), "slide", window, step).shape == (1, 96, 128)


HRDA = ("--data={crop_size: [64, 128], outer_crop_size: [64, 128]}", "--hrda={enabled: true, crop_size: [32, 64]}")
OTHERS = {
    "HRDA": (HRDA, {"source", "target", "pull"}),
    "MIC": ((*HRDA, "--loss_weights.masked_consistency=1"), {"source", "target", "pull", "masked_consistency"}),
    "generalization": (
        ("--method=generalization", "--translate.engine=gaussian_blur", "--drw.apply_to=none"),
        {"source", "pull"},
    ),
}


@pytest.mark.parametrize("family", ["dinov2", "swin"])
@pytest.mark.parametrize("what", OTHERS)
def test_two_updates_of_other_objectives(family, what, tmp_path):
    """On a plain ViT, whose patch of 14 divides no crop of HRDA, and on one with windows."""
    words, terms = OTHERS[what]
    run = started(automatic(write_encoder(family, tmp_path / "encoder"), *words))
    student: Any = run.parts.networks.student
    logged: list[dict[str, torch.Tensor]] = []
    learn(run, next_step(run, 0, 0, random_batch(run.cfg)), logged)
    assert {name for one in logged for name in one} - {"trust"} == terms
    still = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {f"backbone.model.{name}" for name in UNUSED[family]}
    run.parts.optimizer.zero_grad()
    make_updates(run, tmp_path)
    assert all(torch.isfinite(p).all() for p in student.parameters())


# dynamo looks at .grad of whatever it captures.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("family", "backend"), [("dinov2", "aot_eager"), ("convnext", "eager"), ("hiera", "eager")])
def test_compiled_encoders_learn_the_same(family, backend, tmp_path):
    size = ["--data={crop_size: [64, 64], outer_crop_size: [64, 96]}"] if family in ONE_SIZE else []
    cfg = automatic(write_encoder(family, tmp_path / "encoder"), *size)
    plain, compiled = started(cfg), started(cfg)
    torch.compiler.reset()
    compile_networks([compiled.parts.networks.student, compiled.parts.networks.teacher], backend)
    logged: dict[str, list[dict[str, torch.Tensor]]] = {"plain": [], "compiled": []}
    for name, run in (("plain", plain), ("compiled", compiled)):
        torch.manual_seed(0)
        learn(run, next_step(run, 0, 0, random_batch(cfg)), logged[name])
    for one, other in zip(logged["plain"], logged["compiled"], strict=True):
        torch.testing.assert_close(one, other)
    pairs = zip(plain.parts.networks.student.parameters(), compiled.parts.networks.student.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad)


def test_a_run_by_its_command_with_nothing_but_the_name_of_an_encoder(tmp_path, capsys):
    """`model.pretrained` and `size: auto` are all that a run on DINOv2 needs, and its student loads without either."""
    write_encoder("dinov2", tmp_path / "encoder")
    run = {
        "classes": ["road", "sidewalk", "building", "vegetation", "sky", "car"],
        "source": {"path": "streets-source", "num_images": 2},
        "target": {"path": "streets-target", "num_images": 2},
        "test": {"path": "streets-target", "split": "validation", "num_images": 1},
        "model": {"size": "auto", "pretrained": str(tmp_path / "encoder"), "head": "linear"},
        "projector": {"hidden": 8, "dim": 8},
        "data": {"crop_size": [64, 96], "outer_crop_size": [64, 96]},
        "train": {"max_steps": 1, "batch_size": 1, "log_with": []},
        "evaluation": {"source_images": 0},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0

    rmtree(tmp_path / "encoder")
    model, classes = load_model(str(tmp_path / "run" / "t2sda" / "student"))
    assert model.config.backbone_config.model_type == "dinov2"
    assert classes == tuple(run["classes"])
    assert main(["train", "--config", str(tmp_path / "run.yaml"), f"--output_dir={tmp_path / 'other'}"]) != 0
    assert "no checkpoint at" in capsys.readouterr().err


def test_a_random_start_takes_the_sizes_alone(tmp_path):
    folder = write_encoder("convnext", tmp_path)
    (folder / "model.safetensors").unlink()
    cfg = automatic(folder, "--model.random_start=true", "--model.drop_path_rate=0.3")
    student = build_student(cfg)
    assert student.config.backbone_config.drop_path_rate == 0.3
    again = build_student(cfg)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="no weights that can be read"):
        build_student(automatic(folder))


@pytest.mark.parametrize("family", ["convnext", "convnextv2", "resnet"])
def test_what_cannot_be_computed_twice_is_said_before_the_run(family, tmp_path):
    cfg = automatic(write_encoder(family, tmp_path), "--model.activation_checkpointing=true")
    with pytest.raises(
        ValueError, match=r"activation_checkpointing must be false for .*: \w+ cannot be computed twice"
    ):
        build_student(cfg)


def test_crops_that_an_encoder_refuses_are_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"takes images of 64x64 alone .* got 32x64\. Set data\.crop_size"):
        build_student(automatic(write_encoder("hiera", tmp_path)))


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    folder = write_encoder("dinov2", tmp_path)
    gradients = []
    for checkpointing in ("false", "true"):
        cfg = automatic(folder, f"--model.activation_checkpointing={checkpointing}", "--model.drop_path_rate=0")
        run = started(cfg)
        learn(run, next_step(run, 0, 0, random_batch(cfg)), [])
        gradients.append([p.grad for p in run.parts.networks.student.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.pretrained=null", "model.pretrained must be a Hub id or a folder with model.size auto"),
        ("--model.depths=[1, 1, 1, 1]", "model.depths must be null with model.size auto"),
        ("--model.head=deeplabv2", "model.head must be daformer, all_mlp or linear with model.size auto"),
    ],
)
def test_what_means_nothing_with_an_encoder_of_its_own_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        automatic(Path("anywhere"), override)


# Less to train


LORA = ("--train.encoder=lora", "--lora.rank=2", "--lora.alpha=4")
ADAPTED = [family for family in FAMILIES if family not in ("bit", "resnet")]  # those have no linear layers


def trained_names(student: Any) -> set[str]:
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_learn_alone_and_vanish_in_the_model_that_is_saved(family, tmp_path):
    folder = write_encoder(family, tmp_path / "encoder")
    size = ["--data={crop_size: [64, 64], outer_crop_size: [64, 96]}"] if family in ONE_SIZE else []
    run = started(automatic(folder, *size, *LORA, "--optim.lr=0.01", "--optim.warmup_steps=0"))
    networks = run.parts.networks
    student: Any = networks.student
    inside = {name for name in trained_names(student) if name.startswith("backbone.model.")}
    assert inside
    assert all(".lora_A." in name or ".lora_B." in name for name in inside)
    fixed = {name: p.clone() for name, p in student.named_parameters() if not p.requires_grad}

    make_updates(run, tmp_path)

    own = dict(student.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in fixed.items())
    assert all(own[name].any() for name in inside if ".lora_B." in name)  # they begin as 0
    shared = {p.data_ptr() for p in networks.teacher.parameters()}
    assert all(own[name].data_ptr() in shared for name in fixed)
    assert not any(own[name].data_ptr() in shared for name in trained_names(student))
    assert len(run.parts.optimizer.state) == len(trained_names(student))

    whole = merged(student.eval())
    assert student.state_dict().keys() != whole.state_dict().keys()
    whole.save_pretrained(tmp_path / "student")
    loaded = T2SDAForSemanticSegmentation.from_pretrained(tmp_path / "student").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        adapted = student(images).logits
        assert torch.equal(loaded(images).logits, whole(images).logits)
        torch.testing.assert_close(loaded(images).logits, adapted, atol=1e-5, rtol=1e-5)
        assert torch.equal(student(images).logits, adapted)  # the original keeps its adapters


def test_adapters_on_a_mix_transformer(tmp_path):
    cfg = tiny_config(*LORA)
    with pytest.raises(ValueError, match="no checkpoint at 'no file'"):
        build_student(cfg)
    student = tiny_model(cfg)
    limit_training(student, cfg)
    assert sum("lora_" in name for name in trained_names(student)) == 2 * 4 * 6
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(merged(student.eval())(images).logits, student(images).logits)  # B is 0


def test_named_layers_alone_are_adapted(tmp_path):
    folder = write_encoder("dinov2", tmp_path)
    student = build_student(automatic(folder, *LORA, "--lora.targets=[q_proj, v_proj]"))
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in trained_names(student) if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_adapters_that_would_do_nothing_are_refused(tmp_path, monkeypatch):
    folder = write_encoder("dinov2", tmp_path / "dinov2")
    with pytest.raises(ValueError, match=r"lora.targets query match no linear layer of Dinov2Backbone; its are"):
        build_student(automatic(folder, *LORA, "--lora.targets=[query, v_proj]"))
    with pytest.raises(ValueError, match="needs linear layers, and ResNetBackbone has none"):
        build_student(automatic(write_encoder("resnet", tmp_path / "resnet"), *LORA))
    with pytest.raises(ValueError, match=r"train\.encoder must be full with a random start"):
        automatic(folder, *LORA, "--model.random_start=true")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft: pip install 't2sda_hf\[lora\]'"):
        build_student(automatic(folder, *LORA))


def test_a_frozen_encoder_is_one_function_in_one_memory(tmp_path):
    """With batch norm: neither its weights nor its statistics move, in student and teacher, and no gradient is made."""
    folder = write_encoder("resnet", tmp_path / "encoder")
    run = started(automatic(folder, "--train.encoder=frozen"))
    student: Any = run.parts.networks.student.train()
    before = {name: value.clone() for name, value in student.pretrained_encoder.state_dict().items()}

    make_updates(run, tmp_path)

    for network in (student, run.parts.networks.teacher):
        for name, value in network.pretrained_encoder.state_dict().items():
            assert torch.equal(value, before[name]), name
    pairs = zip(student.encoder.parameters(), run.parts.networks.teacher.encoder.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert {name.split(".")[0] for name in trained_names(student)} == {"decode_head", "projector"}
    assert not any(module.training for module in student.pretrained_encoder.modules())
    with pytest.raises(ValueError, match=r"loss_weights\.feature_distance must be 0 with train\.encoder frozen"):
        automatic(folder, "--train.encoder=frozen", "--loss_weights.feature_distance=0.1")


def everything(run: Run) -> dict[str, torch.Tensor]:
    networks = run.parts.networks
    named = {f"student {name}": value for name, value in networks.student.state_dict().items()}
    named |= {f"teacher {name}": value for name, value in networks.teacher.state_dict().items()}
    return named | optimizer_tensors(networks.student, run.parts.optimizer)


@pytest.mark.parametrize("how", ["full", "frozen", "lora"])
def test_four_updates_equal_two_and_two_after_a_checkpoint_of_what_is_trained(how, tmp_path):
    folder = write_encoder("dinov2", tmp_path / "encoder")
    cfg = automatic(folder, f"--train.encoder={how}", "--lora={rank: 2, dropout: 0.1}", "--optim.layer_decay=0.5")
    straight, first = started(cfg), started(cfg)
    make_updates(straight, tmp_path, updates=4)
    make_updates(first, tmp_path)
    student = build_student(cfg)
    store = Store(tmp_path / "run" / "t2sda", cfg, first.accelerator, T2SDAImageProcessor(), student, {"config": {}})
    store.open()
    store.save_checkpoint(first.parts, Progress(2))

    checkpoint = checkpoint_folder(store.folder, 2)
    second = started(cfg)
    load_run(checkpoint, second.parts, second.accelerator)
    make_updates(second, tmp_path, first=2)

    found, expected = everything(second), everything(straight)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    files = {path.name for path in (checkpoint / "student").iterdir()}
    assert ("trained.safetensors" in files, "model.safetensors" in files) == (how != "full", how == "full")
    if how != "full":
        held = load_file(checkpoint / "teacher" / "trained.safetensors")
        assert trained_names(second.parts.networks.student) <= held.keys()
        assert not any(name.endswith("base_layer.weight") or "norm1" in name for name in held)
    loaded = T2SDAForSemanticSegmentation.from_pretrained(_saved(store, second, tmp_path))
    assert not any("lora" in name for name in loaded.state_dict())

    store.save_student(first.parts.networks.student)
    scored = models_of(str(tmp_path / "run"))
    assert [title.rpartition("/")[2] for title in scored] == ["t2sda", "t2sda (teacher)"]
    teacher, classes = scored[list(scored)[1]][1]()
    assert classes == cfg.classes
    averaged = merged(with_statistics_of(first.parts.networks.teacher, first.parts.networks.student)).state_dict()
    assert teacher.state_dict().keys() == averaged.keys()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in teacher.state_dict().items())
    if how != "full":
        rmtree(folder)
        with pytest.raises(ValueError, match=r"cannot be put together: no checkpoint .* or name .*student alone"):
            scored[list(scored)[1]][1]()


def _saved(store: Store, run: Run, folder: Path) -> Path:
    store.save(run.parts.networks.student, folder / "whole")
    return folder / "whole"


def test_blocks_learn_slower_the_further_they_are_from_the_head(tmp_path):
    """BEiT's rule: decay^(N + 1 - i). Embeddings have i = 0, block i of N its number, the last norm N + 1."""
    folder = write_encoder("dinov2", tmp_path)
    student = build_student(automatic(folder))
    scales = layer_scales(student.pretrained_encoder, 0.5)
    named = {name: scales[id(p)] for name, p in student.pretrained_encoder.named_parameters()}
    assert {scale for name, scale in named.items() if name.startswith("embeddings.")} == {0.5**5}
    for block in range(4):
        inside = {scale for name, scale in named.items() if f"layer.{block}." in name or f"layers.{block}." in name}
        assert inside == {0.5 ** (4 - block)}
    assert named["layernorm.weight"] == 1

    optimizer = make_optimizer(
        student.pretrained_encoder, student, OptimConfig(lr=1.0, head_lr_multiplier=10.0, layer_decay=0.5)
    )
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in student.named_parameters():
        if name.startswith("backbone.model."):
            assert rates[id(parameter)] == named[name.removeprefix("backbone.model.")]
        else:  # the pyramid, too: it is new
            assert rates[id(parameter)] == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_block_for_each_of_its_layers(family):
    with torch.device("meta"):
        encoder = AutoBackbone.from_config(FAMILIES[family])
    assert len(blocks_of(encoder)) == 4
    scales = layer_scales(encoder, 0.5)
    assert len(scales) == len(list(encoder.parameters()))
    assert min(scales.values()) == 0.5**5


# Recipes


RECIPES = ("t2sda_dinov2_b", "t2sda_dinov2_l", "t2sda_dinov3_l", "vfm_uda_dinov2_l")


@pytest.mark.parametrize("folder", ["gta_cityscapes", "synthia_cityscapes"])
@pytest.mark.parametrize("name", RECIPES)
def test_two_updates_of_a_recipe_on_a_small_encoder_of_its_kind(folder, name, tmp_path):
    family = "dinov3_vit" if "dinov3" in name else "dinov2"
    cfg = without_data(
        load_config(
            f"{folder}/{name}",
            [
                f"--model.pretrained={write_encoder(family, tmp_path)}",
                "--model.decoder_hidden_size=8",
                "--projector={hidden: 8, dim: 8}",
                "--data={crop_size: [64, 64], outer_crop_size: [64, 128]}",
                "--uda={ignore_top: 2, ignore_bottom: 4, ignore_left: 0, ignore_right: 0}",
                "--pull={num_queries: 4, num_negatives: 8}",
                "--patch_mask.block_size=14",
                "--train.micro_batches=1",
            ],
        )
    )
    run = started(cfg)
    logged: list[dict[str, torch.Tensor]] = []
    learn(run, next_step(run, 0, 0, random_batch(cfg)), logged)
    terms = {"source", "target", "trust", "masked_consistency"} | ({"pull"} if name.startswith("t2sda") else set())
    assert {term for one in logged for term in one} == terms
    run.parts.optimizer.zero_grad()
    make_updates(run, tmp_path)
    assert all(torch.isfinite(p).all() for p in run.parts.networks.student.parameters())


def test_learning_rates_of_the_recipes_follow_the_anchors_rule():
    """VFM-UDA++: lr times the root of the images of an update for the head, and a tenth of it for the encoder."""
    for folder in ("gta_cityscapes", "synthia_cityscapes"):
        for name, rate in (("t2sda_dinov2_b", 5e-5), ("t2sda_dinov2_l", 1e-5), ("vfm_uda_dinov2_l", 1e-5)):
            cfg = load_config(f"{folder}/{name}")
            images = cfg.train.batch_size * cfg.train.micro_batches
            assert cfg.optim.lr == pytest.approx(rate * images**0.5 / 10, rel=0.02)
            assert (cfg.optim.head_lr_multiplier, cfg.optim.layer_decay, cfg.uda.ema_momentum) == (10, 0.9, 0.999)


def test_a_dry_run_of_a_recipe_from_a_stand_in_folder(tmp_path, capsys):
    """Random weights of a small DINOv2 and drawn streets stand for what would be downloaded."""
    write_encoder("dinov2", tmp_path / "stand-in")
    words = [
        *(f"--{role}={{path: streets-{role}, num_images: 2, resize: null}}" for role in ("source", "target")),
        "--test={path: streets-target, num_images: 1, resize: null}",
        f"--model.pretrained={tmp_path / 'stand-in'}",
        "--data={crop_size: [64, 96], outer_crop_size: [64, 96]}",
        "--uda={ignore_top: 0, ignore_bottom: 0}",
        "--rcs.min_pixels=5",
        "--pull={num_queries: 4, num_negatives: 8}",
        "--projector={hidden: 8, dim: 8}",
        "--model.decoder_hidden_size=8",
        "--train.log_with=[]",
        f"--output_dir={tmp_path / 'run'}",
    ]
    assert main(["train", "--config", "gta_cityscapes/t2sda_dinov2_l", *words, "--dry-run"]) == 0
    assert "dry run passed" in capsys.readouterr().out

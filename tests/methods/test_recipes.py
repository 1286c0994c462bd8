"""The recipes of configs/{gta,synthia}_cityscapes: their values are the paper's, and two small updates of each run."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import alone, tiny_batch, tiny_parts
from torch import Generator, nn

from t2sda_hf.config import LossWeights, RunConfig, load_config
from t2sda_hf.methods import METHODS
from t2sda_hf.methods.t2sda import t2sda_losses
from t2sda_hf.teacher import update_teacher
from t2sda_hf.training.loop import weighted_sum
from t2sda_hf.training.optim import make_optimizer

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = ("gta_cityscapes", "synthia_cityscapes")
SELF_TRAINING = {"source", "feature_distance", "target", "trust"}
# name: losses, student's and teacher's encoder forwards of one step
RECIPES: dict[str, tuple[set[str], int, int]] = {
    "source_only": ({"source"}, 1, 0),
    "daformer": (SELF_TRAINING, 2, 1),
    "t2sda_daformer": (SELF_TRAINING | {"pull"}, 3, 2),
    "dacs_deeplabv2": (SELF_TRAINING, 2, 1),
    "t2sda_deeplabv2": (SELF_TRAINING | {"pull"}, 3, 2),
    "hrda": (SELF_TRAINING, 4, 2),
    "t2sda_hrda": (SELF_TRAINING | {"pull"}, 5, 3),
    "mic": (SELF_TRAINING | {"masked_consistency"}, 6, 2),
    "t2sda_mic": (SELF_TRAINING | {"masked_consistency", "pull"}, 7, 3),
}
EVERY = [pytest.param(folder, name, id=f"{folder}-{name}") for folder in FOLDERS for name in RECIPES]


def recipe(folder: str, name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / folder / f"{name}.yaml", overrides)


def small(folder: str, name: str, *overrides: str) -> RunConfig:
    """The recipe with a tiny network and tiny crops; everything else is its own."""
    high = recipe(folder, name).hrda.enabled
    head = recipe(folder, name).model.head
    sizes = "[16, 16, 24, 32]" if head == "deeplabv2" else "[8, 16, 24, 32]"
    crop, outer = ("[64, 128]", "[96, 192]") if high else ("[32, 64]", "[48, 96]")
    return recipe(
        folder,
        name,
        f"--model={{depths: [1, 1, 1, 1], hidden_sizes: {sizes}, num_attention_heads: [1, 2, 3, 4]}}",
        "--model.decoder_hidden_size=8",
        "--projector={hidden: 8, dim: 8}",
        f"--data={{crop_size: {crop}, outer_crop_size: {outer}}}",
        "--hrda.crop_size=[32, 32]",
        "--uda={ignore_top: 2, ignore_bottom: 4}",
        "--pull={num_queries: 4, num_negatives: 8}",
        *overrides,
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folder_holds_these_recipes(folder):
    assert {path.stem for path in (CONFIGS / folder).glob("*.yaml")} >= set(RECIPES)


@pytest.mark.parametrize(("folder", "name"), EVERY)
def test_two_updates_of_a_small_version(folder, name):
    cfg = small(folder, name)
    parts, batch = tiny_parts(cfg), tiny_batch(cfg)
    calls: Counter[str] = Counter()
    for network in ("student", "teacher"):
        encoder: nn.Module = getattr(parts, network).encoder
        encoder.register_forward_hook(lambda *_, network=network: calls.update([network]))
    optimizer = make_optimizer(parts.student.encoder, parts.student, cfg.optim)
    expected, student, teacher = RECIPES[name]
    torch.manual_seed(0)
    for step in range(2):
        before = [parameter.clone() for parameter in parts.student.parameters()]
        names: set[str] = set()
        for terms in METHODS[cfg.method](batch, parts, cfg, step, Generator().manual_seed(step), alone):
            loss = weighted_sum(terms, cfg.loss_weights)
            assert torch.isfinite(loss)
            loss.backward()
            names |= set(terms)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(parts.teacher, parts.student, 0.5)
        assert names == expected
        trained = {
            name.split(".")[0]
            for (name, new), old in zip(parts.student.named_parameters(), before, strict=True)
            if not torch.equal(new, old)
        }
        assert ("projector" in trained) == ("pull" in expected)
        assert {"decode_head"} < trained
    assert (calls["student"], calls["teacher"]) == (2 * student, 2 * teacher)


@pytest.mark.parametrize(("folder", "name"), EVERY)
def test_a_weight_of_zero_removes_its_forwards(folder, name):
    """Every recipe without all but the source: one student forward, or two of two scales, and no teacher."""
    cfg = small(folder, name, "--loss_weights={target: 0, pull: 0, masked_consistency: 0, feature_distance: 0}")
    parts, calls = tiny_parts(cfg), Counter()
    for network in ("student", "teacher"):
        getattr(parts, network).encoder.register_forward_hook(lambda *_, network=network: calls.update([network]))
    list(METHODS[cfg.method](tiny_batch(cfg), parts, cfg, 0, Generator().manual_seed(0), alone))
    assert calls == {"student": 2 if cfg.hrda.enabled else 1}


# ------------------------------------------------------------------------------------------- values of method.md 5.13


@pytest.mark.parametrize(("folder", "name"), EVERY)
def test_sizes_and_sampling_are_those_of_the_specification(folder, name):
    cfg = recipe(folder, name)
    high = name.endswith(("hrda", "mic"))
    gta = folder == "gta_cityscapes"
    sizes = {
        (True, False): (720, 1280),
        (True, True): (1440, 2560),
        (False, False): (760, 1280),
        (False, True): (1520, 2560),
    }
    assert cfg.source.resize == sizes[gta, high]
    assert cfg.target.resize == cfg.test.resize == ((1024, 2048) if high else (512, 1024))
    assert cfg.data.crop_size == ((1024, 1024) if high else (512, 512))
    if cfg.translates:
        assert cfg.data.outer_crop_size == ((1024, 2048) if high else (512, 1024))
    assert cfg.uses_outer_crop == name.startswith("t2sda")
    assert (cfg.rcs.temperature, cfg.rcs.min_pixels) == (0.01, 3000)
    assert cfg.rcs.min_crop_ratio == (2.0 if high else 0.5)
    assert cfg.rcs.enabled == (name != "source_only")
    margins = (cfg.uda.ignore_top, cfg.uda.ignore_bottom, cfg.uda.ignore_left, cfg.uda.ignore_right)
    assert margins == ((30, 240, 30, 30) if high else (15, 120, 0, 0))
    assert (cfg.uda.ema_momentum, cfg.uda.pseudo_threshold) == (0.999, 0.968)
    windows = (cfg.evaluation.mode, cfg.evaluation.window, cfg.evaluation.stride)
    assert windows == (("slide", (1024, 1024), (512, 512)) if high else ("whole", None, None))
    assert cfg.output_dir == f"outputs/{folder}_{name}"
    assert {domain.path for domain in (cfg.target, cfg.test)} == {"data/cityscapes"}
    assert cfg.source.path == ("data/gta5" if gta else "data/synthia")


@pytest.mark.parametrize(("folder", "name"), EVERY)
def test_objective_and_network_are_those_of_the_specification(folder, name):
    cfg = recipe(folder, name)
    pulls = name.startswith("t2sda") or name == "source_only"  # source_only does not read it
    assert cfg.loss_weights == LossWeights(
        pull=0.1 if pulls else 0.0, masked_consistency=1.0 if name.endswith("mic") else 0.0
    )
    assert cfg.hrda.enabled == name.endswith(("hrda", "mic"))
    assert (cfg.hrda.crop_size, cfg.hrda.detail_weight) == ((512, 512), 0.1)
    assert (cfg.patch_mask.block_size, cfg.patch_mask.ratio) == (64, 0.7)
    cnn = name.endswith("deeplabv2")
    assert (cfg.model.size, cfg.model.head) == (("resnet101c", "deeplabv2") if cnn else ("mit_b5", "daformer"))
    assert cfg.projector.in_index is None
    assert cfg.model.pretrained == ("timm/resnet101c.gluon_in1k" if cnn else "nvidia/mit-b5")
    assert len(cfg.classes) == 19
    missing = set(cfg.classes) - set(cfg.pull.class_set or cfg.classes)
    expected = {"terrain", "truck", "train"} if folder == "synthia_cityscapes" and name.startswith("t2sda") else set()
    assert missing == expected
    assert (cfg.optim.lr, cfg.optim.head_lr_multiplier, cfg.train.max_steps, cfg.train.batch_size) == (
        6e-5,
        10,
        40_000,
        2,
    )


# ------------------------------------------------------------------------------------------------------ the CNN recipe


CNN = ("gta_cityscapes", "t2sda_deeplabv2", "--classes=[road, building, sky, person, car]")


def test_keys_and_anchor_of_the_cnn_are_the_last_stage_at_stride_8():
    cfg = small(*CNN)
    parts, batch = tiny_parts(cfg), tiny_batch(cfg)
    shapes: list[Any] = []
    parts.teacher.projector.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape)))
    parts.imagenet.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.last_hidden_state.shape)))
    values = {
        name: value
        for terms in t2sda_losses(batch, parts, cfg, 0, Generator().manual_seed(0), alone)
        for name, value in terms.items()
    }
    assert shapes == [(2, 8, 4, 8), (2, 32, 4, 8), (2, 8, 4, 8)]  # target keys, anchor, source keys
    assert values["feature_distance"] > 0  # blocks of 8 pixels are whole cells at stride 8
    assert values["pull"] > 0


@pytest.mark.parametrize("track", [True, False])
def test_pseudo_target_images_count_in_the_running_statistics_if_the_run_says_so(track):
    cfg = small(*CNN, f"--pull.bn_track_ptarget={track}", "--loss_weights={source: 0, target: 0, feature_distance: 0}")
    parts = tiny_parts(cfg)
    norm, own = parts.student.resnet.layer4[0].bn2, parts.student.projector.block1[1]
    before, own_before = norm.running_mean.clone(), own.running_mean.clone()
    (terms,) = t2sda_losses(tiny_batch(cfg), parts, cfg, 0, Generator().manual_seed(0), alone)
    assert torch.equal(norm.running_mean, before) != track
    assert norm.momentum == 0.1
    assert not torch.equal(own.running_mean, own_before)  # the projector sees nothing else
    terms["pull"].backward()
    assert parts.student.resnet.stem[0].weight.grad.abs().max() > 0

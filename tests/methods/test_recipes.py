"""The recipes of configs/{gta,synthia}_cityscapes: their values are the paper's, and two small updates of each run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import small_recipe, tiny_batch, tiny_graphs, tiny_networks, together

from t2sda_hf.config import LossWeights, RunConfig, load_config
from t2sda_hf.teacher import update_teacher
from t2sda_hf.training.loop import backward
from t2sda_hf.training.optim import make_optimizer

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = ("gta_cityscapes", "synthia_cityscapes")
SELF_TRAINING = {"source", "feature_distance", "target"}
RECIPES: dict[str, set[str]] = {  # name: losses
    "source_only": {"source"},
    "daformer": SELF_TRAINING,
    "t2sda_daformer": SELF_TRAINING | {"pull"},
    "dacs_deeplabv2": SELF_TRAINING,
    "t2sda_deeplabv2": SELF_TRAINING | {"pull"},
    "hrda": SELF_TRAINING,
    "t2sda_hrda": SELF_TRAINING | {"pull"},
    "mic": SELF_TRAINING | {"masked_consistency"},
    "t2sda_mic": SELF_TRAINING | {"masked_consistency", "pull"},
}
EVERY = [pytest.param(folder, name, id=f"{folder}-{name}") for folder in FOLDERS for name in RECIPES]


def recipe(folder: str, name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / folder / f"{name}.yaml", overrides)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folder_holds_these_recipes(folder):
    assert {path.stem for path in (CONFIGS / folder).glob("*.yaml")} >= set(RECIPES)


@pytest.mark.parametrize(("folder", "name"), EVERY)
def test_two_updates_of_a_small_version(folder, name):
    cfg = small_recipe(folder, name)
    networks, batch = tiny_networks(cfg), tiny_batch(cfg)
    optimizer = make_optimizer(networks.student.encoder, networks.student, cfg.optim)
    for step in range(2):
        before = [parameter.clone() for parameter in networks.student.parameters()]
        names: set[str] = set()
        for graph in tiny_graphs(cfg, networks, batch, index=step, seed=step):
            assert all(torch.isfinite(loss) for loss in graph.losses.values())
            backward(graph.losses, cfg.loss_weights, networks.student.parameters())
            names |= set(graph.losses)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(networks.teacher, networks.student, 0.5)
        assert names == RECIPES[name]
        trained = {
            name.split(".")[0]
            for (name, new), old in zip(networks.student.named_parameters(), before, strict=True)
            if not torch.equal(new, old)
        }
        assert ("projector" in trained) == ("pull" in names)
        assert {"decode_head"} < trained


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
        feature_distance=0.005,
        pull=0.1 if pulls else 0.0,
        masked_consistency=1.0 if name.endswith("mic") else 0.0,
    )
    assert cfg.hrda.enabled == name.endswith(("hrda", "mic"))
    assert (cfg.hrda.crop_size, cfg.hrda.detail_weight) == ((512, 512) if cfg.hrda.enabled else None, 0.1)
    assert cfg.patch_mask.block_size == (64 if name.endswith(("hrda", "mic")) else None)  # others do not mask
    assert cfg.patch_mask.ratio == 0.7
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
    cfg = small_recipe(*CNN)
    networks = tiny_networks(cfg)
    shapes: list[Any] = []
    networks.teacher.projector.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape)))
    networks.imagenet.register_forward_hook(
        lambda _, args, output: shapes.append(tuple(output.last_hidden_state.shape))
    )
    losses, _ = together(tiny_graphs(cfg, networks))
    assert shapes == [(2, 8, 4, 8), (2, 32, 4, 8), (2, 8, 4, 8)]  # target keys, anchor, source keys
    assert losses["feature_distance"] > 0  # blocks of 8 pixels are whole cells at stride 8
    assert losses["pull"] > 0


@pytest.mark.parametrize("track", [True, False])
def test_pseudo_target_images_count_in_the_running_statistics_if_the_run_says_so(track):
    weights = "--loss_weights={source: 0, target: 0, feature_distance: 0}"
    cfg = small_recipe(*CNN, f"--pull.bn_track_ptarget={track}", weights)
    networks = tiny_networks(cfg)
    norm, own = networks.student.resnet.layer4[0].bn2, networks.student.projector.block1[1]
    before, own_before = norm.running_mean.clone(), own.running_mean.clone()
    (graph,) = tiny_graphs(cfg, networks)
    assert torch.equal(norm.running_mean, before) != track
    assert norm.momentum == 0.1
    assert not torch.equal(own.running_mean, own_before)  # the projector sees nothing else
    graph.losses["pull"].backward()
    assert networks.student.resnet.stem[0].weight.grad.abs().max() > 0

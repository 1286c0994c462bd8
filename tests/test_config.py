"""The run as a tree: the paper's defaults, and a message with the full key for everything that is wrong."""

import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_config

from t2sda_hf.config import (
    DomainConfig,
    RunConfig,
    differences,
    domain_names,
    dump_config,
    hub_id,
    json_schema,
    keys,
    load_config,
)
from t2sda_hf.labels import CITYSCAPES_CLASSES

Load = Callable[[str, str], RunConfig]


def by_yaml_dotted(folder: Path) -> Load:
    def load(key: str, value: str) -> RunConfig:
        (folder / "run.yaml").write_text(f"{key}: {value}\n", encoding="utf-8")
        return load_config(folder / "run.yaml")

    return load


def by_yaml_nested(folder: Path) -> Load:
    def load(key: str, value: str) -> RunConfig:
        *sections, leaf = key.split(".")
        text = f"{leaf}: {value}"
        for section in reversed(sections):
            text = f"{section}: {{{text}}}"
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        return load_config(folder / "run.yaml")

    return load


def by_command_line(folder: Path) -> Load:
    return lambda key, value: load_config(None, [f"--{key}", value])


@pytest.fixture(params=[by_yaml_dotted, by_yaml_nested, by_command_line])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Load:
    return request.param(tmp_path)


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for item in fields(config):
        value = getattr(config, item.name)
        found |= leaves(value, f"{prefix}{item.name}.") if is_dataclass(value) else {f"{prefix}{item.name}": value}
    return found


def get(config: RunConfig, key: str) -> Any:
    return leaves(config)[key]


# -------------------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "t2sda"),
        ("classes", CITYSCAPES_CLASSES),
        ("model.size", "mit_b5"),
        ("model.pretrained", "nvidia/mit-b5"),
        ("model.head", "daformer"),
        ("model.decoder_hidden_size", None),  # 256 with these, see test_resnet and test_configuration
        ("model.head_dropout", 0.1),
        ("model.drop_path_rate", 0.1),
        ("projector.in_index", None),  # all four levels of a MiT, the last stage of a ResNet
        ("projector.kernel", 1),
        ("projector.hidden", 256),
        ("projector.dim", 256),
        ("projector.final_relu", True),
        ("data.crop_size", None),  # null, here and below: `training.derive` makes it of the data, see test_derive
        ("data.outer_crop_size", None),
        ("data.outer_crop", "auto"),
        ("data.cat_max_ratio", 0.75),
        ("rcs.enabled", True),
        ("rcs.temperature", None),
        ("rcs.min_pixels", None),
        ("rcs.min_crop_ratio", None),
        ("uda.ema_momentum", None),
        ("uda.pseudo_threshold", 0.968),
        ("uda.weight_scope", "batch"),
        ("uda.ignore_top", 0),  # 15 and 120 in the recipes for Cityscapes
        ("uda.ignore_bottom", 0),
        ("mix.classes_from", "batch"),
        ("mix.source", "source"),
        ("augment.jitter_probability", 0.8),
        ("augment.jitter_strength", 0.2),
        ("augment.blur_probability", 0.5),
        ("translate.engine", "fda"),
        ("translate.reference", "paired"),
        ("translate.fda.beta", None),
        ("translate.fda.window", "square"),
        ("translate.fda.clip", False),
        ("translate.hrda_scale", "context"),
        ("pull.temperature", 0.2),
        ("pull.num_queries", 128),
        ("pull.num_negatives", 1024),
        ("pull.unreliable_ratio", 0.5),
        ("pull.objective", "infonce"),
        ("pull.query_sampling", "cbqs"),
        ("pull.negatives", "denps"),
        ("pull.share_negatives", "class"),
        ("pull.reduction", "mean_w"),
        ("pull.label_downscale", "nearest"),
        ("pull.ignore_as_negative", False),
        ("pull.class_set", ()),
        ("pull.gamma_scope", "batch"),
        ("pull.target_min_conf", 0.0),
        ("pull.sync_stats", True),
        ("pull.teacher_forward", "separate"),
        ("pull.start_step", 0),
        ("uda.source_phase", 0.0),
        ("uda.target_statistics", 0),
        ("balance.labelled", "none"),
        ("balance.doubt", 0.0),
        ("augment.source", "none"),
        ("pull.augment", False),
        ("pull.proto_momentum", 0.0),
        ("pull.proto_prenorm", False),
        ("drw.apply_to", "pull"),
        ("drw.beta", 0.5),
        ("drw.absent_conf", "zero"),
        ("drw.use_valid_mask", False),
        ("drw.normalise_over", "all"),
        ("feature_distance.classes", ()),
        ("feature_distance.min_ratio", 0.75),
        ("loss_weights.source", 1.0),
        ("loss_weights.feature_distance", 0.0),  # 0.005 on things in the recipes for Cityscapes
        ("loss_weights.target", 1.0),
        ("loss_weights.pull", 0.1),
        ("optim.lr", 6e-5),
        ("optim.head_lr_multiplier", 10.0),
        ("optim.weight_decay", 0.01),
        ("optim.warmup_steps", None),
        ("optim.warmup_ratio", 1e-6),
        ("optim.power", 1.0),
        ("optim.max_grad_norm", None),
        ("train.max_steps", 40_000),
        ("train.compile", "none"),
        ("train.batch_size", 2),
        ("train.precision", "tf32"),
        ("evaluation.mode", "whole"),
    ],
)
def test_defaults_are_the_papers_or_serve_any_data(key, value):
    assert get(RunConfig(), key) == value
    assert get(load_config(), key) == value


def test_a_run_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        RunConfig().seed = 1
    with pytest.raises(FrozenInstanceError):
        RunConfig().optim.lr = 1


# --------------------------------------------------------------------------------------------- what is understood


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "6e-5", 6e-5),  # a text to YAML 1.1, which wants 6.0e-5
        ("optim.lr", "6.0e-5", 6e-5),
        ("optim.lr", "1E-3", 1e-3),
        ("optim.lr", "+.5", 0.5),
        ("optim.lr", "1", 1.0),
        ("optim.warmup_ratio", "1e-6", 1e-6),
        ("optim.max_grad_norm", "1e1", 10.0),
        ("optim.max_grad_norm", "null", None),
        ("train.max_steps", "10_000", 10_000),
        ("data.crop_size", "[192, 128]", (192, 128)),
        ("data.flip", "false", False),
        ("data.outer_crop", "true", "true"),  # a word here, a truth value to YAML
        ("data.outer_crop", "false", "false"),
        ("data.outer_crop", "auto", "auto"),
        ("model.pretrained", "null", None),
        ("model.depths", "[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("source.label_map", "{wall: building, 'traffic light': pole}", {"wall": "building", "traffic light": "pole"}),
        ("source.label_map", "{}", {}),
        ("source.path", "some/folder with spaces", "some/folder with spaces"),
        ("target.class_names", "['1', '2']", ("1", "2")),
        ("test.resize", "[512, 1024]", (512, 1024)),
        ("translate.fda.beta", "0.05", 0.05),
        ("train.log_with", "[]", ()),
        ("drw.apply_to", "none", "none"),
    ],
)
def test_values_are_read_in_yamls_form_from_either_place(load, key, text, value):
    if key == "model.pretrained":
        cfg = load_config(None, [f"--{key}={text}", "--loss_weights.feature_distance=0"])
    else:
        cfg = load(key, text)
    assert get(cfg, key) == value
    assert type(get(cfg, key)) is type(value)
    others = {name for name, default in leaves(RunConfig()).items() if get(cfg, name) != default} - {key}
    assert others <= {"loss_weights.feature_distance"}


def test_a_section_given_in_part_keeps_the_rest_of_its_default(load):
    """The test domain differs from the other two in its split, whatever else is set."""
    assert load("test.path", "somewhere").test == replace(RunConfig().test, path="somewhere")
    assert RunConfig().test.split != RunConfig().source.split
    assert load("translate.fda.beta", "0.05").translate.fda == replace(RunConfig().translate.fda, beta=0.05)


def test_the_command_line_wins_over_the_file_and_the_later_over_the_earlier(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\noptim: {lr: 1e-3, power: 2}\noptim.warmup_steps: 7\n", encoding="utf-8")
    cfg = load_config(path, ["--seed", "2", "--optim.lr=1e-4", "--optim={weight_decay: 0}", "--seed=3"])
    assert (cfg.seed, cfg.optim.lr, cfg.optim.power, cfg.optim.weight_decay, cfg.optim.warmup_steps) == (
        3,
        1e-4,
        2,
        0,
        7,
    )


def test_an_empty_file_is_the_default_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n", encoding="utf-8")
    assert load_config(path) == RunConfig()


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        tiny_config(),
        tiny_config("--optim.lr=3e-7", "--data.outer_crop=true", "--optim.max_grad_norm=1", "--model.depths=null"),
        tiny_config("--source={path: a b, label_map: {'on': 'off', '1': road}, class_names: ['no', '2', on the road]}"),
        tiny_config("--evaluation={mode: slide, window: [32, 64], stride: [16, 32]}", "--train.log_with=[]"),
    ],
)
def test_a_run_that_is_written_reads_back_equal(config, tmp_path):
    path = tmp_path / "resolved_config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert dump_config(load_config(path)) == dump_config(config)


MAPPINGS = ("label_map", "terms")  # fields that are dictionaries themselves


def test_the_written_run_is_complete():
    written, known = yaml.safe_load(dump_config(tiny_config())), set(leaves(RunConfig()))

    def flat(tree: dict[str, Any], prefix: str = "") -> set[str]:
        keys = set()
        for name, value in tree.items():
            keys |= {prefix + name} if prefix + name in known else flat(value, f"{prefix}{name}.")
        return keys

    assert flat(written) == known


# The register of open points: what the paper leaves open, its key, and the choice.
REGISTER = {
    "A1": {"translate.fda.beta": None},  # 0.01, and more in small windows
    "A2": {"projector.kernel": 1, "projector.hidden": 256, "projector.dim": 256},
    "A3": {"projector.in_index": None},  # all levels of a MiT, the last stage of a ResNet
    "A4": {"train.precision": "tf32"},
    "A5": {"pull.teacher_forward": "separate"},
    "A6": {"uda.weight_scope": "batch"},
    "A7": {"mix.source": "source", "uda.source_ce_on": "source"},
    "A8": {"pull.sync_stats": True},
    "A9": {"translate.reference": "paired"},
    "A10": {"data.outer_crop": "auto"},
    "A11": {"rcs.enabled": True, "loss_weights.feature_distance": 0.0},  # 0.005 in the recipes for Cityscapes
    "A12": {"translate.fda.window": "square"},
    "A13": {"translate.color_jitter.probability": 0.8, "translate.gaussian_blur.probability": 0.5},
    "A14": {"pull.label_downscale": "nearest"},
    "A15": {"pull.ignore_as_negative": False},
    "A16": {"pull.class_set": ()},  # 16 names in configs/synthia_cityscapes
    "A17": {"pull.query_sampling": "cbqs"},  # off is ceqs, see Table 8
    "A18": {"pull.gamma_scope": "batch"},
    "A19": {"pull.share_negatives": "class"},
    "A20": {"pull.reduction": "mean_w"},
    "A21": {"drw.absent_conf": "zero"},
    "A22": {"drw.apply_to": "pull", "drw.use_valid_mask": False, "drw.normalise_over": "all"},
    "A23": {"translate.hrda_scale": "context"},
    "A24": {"pull.target_min_conf": 0.0},
    "A25": {"rcs.enabled": True, "loss_weights.feature_distance": 0.0},  # both off in configs/generalization
    "A31": {"pull.start_step": 0},
    "A33": {"pull.augment": False},
    "A34": {"pull.proto_momentum": 0.0},
    "A35": {"pull.proto_prenorm": False},
    "A37": {"loss_weights.pull": 0.1},
    "A38": {"classes": CITYSCAPES_CLASSES},  # 19 outputs for SYNTHIA as well
    "A40": {"data.outer_crop_size": None},  # at most 512x1024
}
# Answered by a table or by what there is: the β of Table 14, sample sd, the head's feature (analyze.py), every tenth
# source image (Table 17), the tail (Table 9), n per mini-batch, the projector in the teacher, no pull on masked images.
WITHOUT_A_KEY = {"A26", "A27", "A28", "A29", "A30", "A32", "A36", "A39"}


@pytest.mark.parametrize("point", REGISTER)
def test_every_open_point_has_its_key_and_its_default(point):
    assert {key: get(RunConfig(), key) for key in REGISTER[point]} == REGISTER[point]


def test_no_open_point_is_left_out():
    assert set(REGISTER) | WITHOUT_A_KEY == {f"A{number}" for number in range(1, 41)}


def test_the_page_of_open_points_has_every_key_that_names_one():
    page = (Path(__file__).parents[1] / "docs" / "open-points.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(): row for row in page.splitlines() if row.startswith("| A")}
    assert set(rows) == set(REGISTER) | WITHOUT_A_KEY
    for key in keys().values():
        if key.source.startswith("O "):
            assert f"`{key.name}`" in rows[key.source[2:]], key.name


def test_what_nothing_reads_is_no_difference():
    """So a run of the first release, whose feature distance had classes and no weight, goes on."""
    assert differences({"feature_distance.classes": ["car"]}, {}) == {}
    weighed = {"feature_distance.classes": ["car"], "loss_weights.feature_distance": 0.1}
    assert set(differences(weighed, {})) == {"loss_weights.feature_distance"}
    assert set(differences(weighed, {"loss_weights.feature_distance": 0.2})) == set(weighed)


# ------------------------------------------------------------------------------------------------ what is refused

UNKNOWN = [  # what was written: the key that was meant
    ("optm.lr", "optim.lr"),
    ("optim.Lr", "optim.lr"),
    ("lr", "optim.lr"),
    ("train.lr", "optim.lr"),
    ("optim.warmup", "optim.warmup_steps"),
    ("optim.wieght_decay", "optim.weight_decay"),
    ("optim.weight-decay", "optim.weight_decay"),
    ("seeds", "seed"),
    ("sed", "seed"),
    ("clases", "classes"),
    ("methd", "method"),
    ("outputdir", "output_dir"),
    ("train.output_dir", "output_dir"),
    ("sorce.path", "source.path"),
    ("source.pth", "source.path"),
    ("traget.path", "target.path"),
    ("target.label_colum", "target.label_column"),
    ("tets.resize", "test.resize"),
    ("test.splt", "test.split"),
    ("source.labelmap", "source.label_map"),
    ("model.heads", "model.head"),
    ("model.pre_trained", "model.pretrained"),
    ("model.decoder_hiden_size", "model.decoder_hidden_size"),
    ("projector.kernal", "projector.kernel"),
    ("dataset.crop_size", "data.crop_size"),
    ("data.cropsize", "data.crop_size"),
    ("data.num_worker", "data.num_workers"),
    ("rcs.enable", "rcs.enabled"),
    ("rcs.min_pixel", "rcs.min_pixels"),
    ("uda.ema_momentun", "uda.ema_momentum"),
    ("uda.threshold", "uda.pseudo_threshold"),
    ("mix.class_from", "mix.classes_from"),
    ("augmentation.jitter_strength", "augment.jitter_strength"),
    ("translate.fda.betta", "translate.fda.beta"),
    ("translate.beta", "translate.fda.beta"),
    ("translate.engin", "translate.engine"),
    ("pull.temprature", "pull.temperature"),
    ("pull.num_querys", "pull.num_queries"),
    ("pull.query_samplng", "pull.query_sampling"),
    ("loss_weight.pull", "loss_weights.pull"),
    ("loss_weights.pul", "loss_weights.pull"),
    ("drw.apply", "drw.apply_to"),
    ("feature_distance.min_ration", "feature_distance.min_ratio"),
    ("train.maxsteps", "train.max_steps"),
    ("max_steps", "train.max_steps"),
    ("evaluation.windows", "evaluation.window"),
]


@pytest.mark.parametrize(("written", "meant"), UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(load, written, meant):
    with pytest.raises(ValueError, match="unknown key") as caught:
        load(written, "1")
    assert f"unknown key {written!r} in " in str(caught.value)
    assert f"Did you mean {meant!r}?" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "offered"),
    [("optim.learning_rate", "optim.lr"), ("pull.lamda", "pull.temperature"), ("backbone", "model")],
)
def test_an_unknown_key_like_no_other_is_refused_with_those_of_its_section(load, written, offered):
    with pytest.raises(ValueError, match=f"unknown key {written!r}") as caught:
        load(written, "1")
    assert re.search(rf"(Keys there|Keys and sections) are .*\b{re.escape(offered)}\b", str(caught.value))


WRONG_TYPES = [
    ("optim.lr", "abc", "a number"),
    ("optim.lr", "6e-5x", "a number"),
    ("optim.lr", "'1,5'", "a number"),
    ("optim.lr", "true", "a number"),
    ("optim.lr", "null", "a number"),
    ("optim.lr", "[1e-4]", "a number"),
    ("optim.lr", "{a: 1}", "a number"),
    ("optim.lr", ".nan", "a number"),
    ("optim.weight_decay", ".inf", "a number"),
    ("loss_weights.pull", "off", "a number"),
    ("pull.temperature", "'0,2'", "a number"),
    ("model.head_dropout", "yes", "a number"),
    ("translate.fda.beta", "small", "a number"),
    ("optim.max_grad_norm", "none", "a number or null"),
    ("train.max_steps", "40k", "a whole number"),
    ("train.max_steps", "3.5", "a whole number"),
    ("train.max_steps", "4e4", "a whole number"),
    ("train.max_steps", "null", "a whole number"),
    ("train.batch_size", "'2'", "a whole number"),
    ("seed", "1.0", "a whole number"),
    ("seed", "[0, 1, 2]", "a whole number"),
    ("projector.kernel", "true", "a whole number"),
    ("train.num_threads", "false", "a whole number or null"),
    ("source.num_images", "all", "a whole number or null"),
    ("evaluation.limit", "1.5", "a whole number or null"),
    ("data.flip", "1", "true or false"),
    ("data.flip", "maybe", "true or false"),
    ("data.flip", "'true'", "true or false"),
    ("rcs.enabled", "null", "true or false"),
    ("pull.augment", "0.5", "true or false"),
    ("output_dir", "[a]", "text"),
    ("output_dir", "null", "text"),
    ("target.split", "5", "text"),
    ("source.path", "no", "text"),
    ("model.size", "5", "text"),
    ("model.pretrained", "1", "text (a number in quotes) or null"),
    ("data.crop_size", "512", "a list like [a, b] of 2 whole numbers"),
    ("data.crop_size", "512x512", "a list like [a, b] of 2 whole numbers"),
    ("data.crop_size", "[512]", "a list like [a, b] of 2 whole numbers"),
    ("data.crop_size", "[512, 512, 3]", "a list like [a, b] of 2 whole numbers"),
    ("data.crop_size", "[512.0, 512]", "a list like [a, b] of 2 whole numbers"),
    ("source.resize", "[720]", "a list like [a, b] of 2 whole numbers or null"),
    ("test.resize", "{height: 1}", "a list like [a, b] of 2 whole numbers or null"),
    ("evaluation.window", "32", "a list like [a, b] of 2 whole numbers or null"),
    ("model.depths", "[1, 1, x, 1]", "a list like [a, b] of 4 whole numbers or null"),
    ("model.depths", "[]", "a list like [a, b] of 4 whole numbers or null"),
    ("model.hidden_sizes", "[32, 64, 160]", "a list like [a, b] of 4 whole numbers or null"),
    ("projector.in_index", "0", "a list like [a, b] of whole numbers"),
    ("classes", "road", "a list like [a, b] of texts"),
    ("classes", "[road, 3]", "a list like [a, b] of texts"),
    ("classes", "[on, off]", "a list like [a, b] of texts"),
    ("classes", "{road: sky}", "a list like [a, b] of texts"),
    ("pull.class_set", "null", "a list like [a, b] of texts"),
    ("train.log_with", "tensorboard", "a list like [a, b] of texts"),
    ("target.class_names", "[[a], b]", "a list like [a, b] of texts"),
    ("source.label_map", "[a, b]", "a mapping like {a: b} of texts"),
    ("source.label_map", "{wall: 3}", "a mapping like {a: b} of texts"),
    ("source.label_map", "{3: wall}", "a mapping like {a: b} of texts"),
    ("source.label_map", "wall", "a mapping like {a: b} of texts"),
    ("method", "dacs", "one of t2sda, source_only"),
    ("method", "null", "one of t2sda, source_only"),
    ("baseline", "dacs", "one of none, source_only"),
    ("model.head", "segformer", "one of daformer, all_mlp, linear, deeplabv2"),
    ("data.outer_crop", "yes please", "one of auto, true, false"),
    ("uda.weight_scope", "pixel", "one of batch, image"),
    ("mix.source", "target", "one of source, pseudo_target"),
    ("translate.engine", "gan", "one of fda, "),
    ("translate.fda.window", "true", "one of square, rect"),
    ("pull.objective", "l2", "one of infonce, mse"),
    ("pull.reduction", "mean", "one of mean_w, sum_paper, mean_paper"),
    ("pull.query_sampling", "CBQS", "one of cbqs, ceqs, uniform"),
    ("drw.absent_conf", "0", "one of zero, one, mean, ema"),
    ("evaluation.mode", "sliding", "one of whole, slide"),
    ("source.resize_mode", "crop", "one of keep_ratio, exact"),
]


@pytest.mark.parametrize(("key", "text", "rule"), WRONG_TYPES)
def test_a_wrong_type_is_refused_with_key_rule_and_value(load, key, text, rule):
    with pytest.raises(ValueError, match="must be") as caught:
        load(key, text)
    message = str(caught.value)
    assert message.startswith(f"{key} in ")
    assert f" must be {rule}" in message
    assert message.endswith(f"got {yaml.safe_load(text)!r}.")


OUT_OF_RANGE = [
    ("optim.lr", "0"),
    ("optim.lr", "-6e-5"),
    ("optim.warmup_steps", "-1"),
    ("seed", "-1"),
    ("classes", "[road]"),
    ("classes", "[road, sky, road]"),
    ("classes", str([f"k{index}" for index in range(256)])),
    ("classes", '[road, "sky\\nsea"]'),
    ("classes", '[road, "\\uD800"]'),
    ("classes", "[road, ' ']"),
    ("source.resize", "[0, 5]"),
    ("source.num_images", "0"),
    ("target.num_images", "-3"),
    ("test.label_space", "marscapes"),
    ("projector.kernel", "2"),
    ("projector.dim", "0"),
    ("projector.hidden", "-1"),
    ("projector.in_index", "[]"),
    ("projector.in_index", "[1, 0]"),
    ("projector.in_index", "[0, 4]"),
    ("data.crop_size", "[16, 512]"),
    ("data.crop_size", "[500, 512]"),
    ("data.cat_max_ratio", "0"),
    ("data.cat_max_ratio", "1.1"),
    ("data.num_workers", "-1"),
    ("rcs.temperature", "0"),
    ("rcs.min_pixels", "-1"),
    ("uda.ema_momentum", "1.5"),
    ("uda.pseudo_threshold", "96.8"),
    ("uda.ignore_top", "-1"),
    ("uda.ignore_bottom", "-2"),
    ("augment.jitter_probability", "2"),
    ("augment.jitter_strength", "-0.1"),
    ("augment.blur_probability", "1.01"),
    ("translate.fda.beta", "0.6"),
    ("translate.fda.beta", "-0.1"),
    ("pull.temperature", "0"),
    ("pull.num_queries", "0"),
    ("pull.num_negatives", "1"),
    ("pull.unreliable_ratio", "50"),
    ("pull.target_min_conf", "1.5"),
    ("pull.start_step", "40000"),
    ("uda.source_phase", "1"),
    ("uda.target_statistics", "-1"),
    ("balance.cap", "0.5"),
    ("balance.doubt", "3"),
    ("pull.proto_momentum", "1"),
    ("pull.class_set", "[road, rod]"),
    ("drw.beta", "-1"),
    ("loss_weights.source", "-1"),
    ("loss_weights.feature_distance", "-1"),
    ("loss_weights.target", "-1"),
    ("loss_weights.pull", "-0.1"),
    ("train.max_steps", "0"),
    ("train.batch_size", "0"),
    ("train.micro_batches", "0"),
    ("train.num_threads", "0"),
    ("train.timeout_seconds", "1e15"),
    ("train.log_every", "0"),
    ("train.evaluate_every", "0"),
    ("train.save_every", "-4000"),
    ("evaluation.mode", "slide"),
    ("evaluation.limit", "0"),
    ("evaluation.window", "[0, 64]"),
    ("evaluation.stride", "[64, 0]"),
    ("test.crop_box", "[0, 0, 0, 8]"),
    ("test.crop_box", "[-1, 0, 8, 8]"),
    ("optim.weight_decay", "-1"),
    ("optim.power", "-1"),
    ("optim.head_lr_multiplier", "0"),
    ("optim.warmup_ratio", "2"),
    ("optim.max_grad_norm", "0"),
    ("model.depths", "[2, 2, 0, 2]"),
    ("model.depths", "[2, 2, 2, 1000000]"),
    ("model.hidden_sizes", "[32, 64, -160, 256]"),
    ("model.num_attention_heads", "[1, 0, 5, 8]"),
    ("model.head_dilations", "[]"),
    ("model.head_dilations", "[1, 0]"),
    ("model.decoder_hidden_size", "0"),
    ("model.head_dropout", "1"),
    ("model.drop_path_rate", "-0.1"),
    ("rcs.min_crop_ratio", "-1"),
    ("feature_distance.min_ratio", "1.5"),
    ("translate.gaussian_blur.sigma", "[2, 1]"),
    ("translate.gaussian_blur.sigma", "[0, 1]"),
]


@pytest.mark.parametrize(("key", "text"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_its_key(load, key, text):
    with pytest.raises(ValueError, match=re.escape(key)) as caught:
        load(key, text)
    message = str(caught.value)
    assert "must be" in message or "needs" in message
    assert key in message.split(" must ")[0].split(" needs ")[0]


def test_every_numeric_key_has_a_range():
    """Not those of an id: which ids there are, a domain knows."""
    words = {name: repr(found.type) for name, found in keys().items()}
    numeric = {name for name, text in words.items() if "Strict" in text and "bool" not in text}
    assert {name for name in numeric if not keys()[name].range} == {
        f"{domain}.{name}"
        for domain in ("source", "target", "target_labelled", "test")
        for name in ("label_ids", "ignore_id")
    } | {"target_labels"}  # which says its own, because it may be a text


def test_the_schema_says_ranges_of_lists_at_their_items():
    depths = json_schema()["$defs"]["ModelConfig"]["properties"]["depths"]
    assert {(one["minimum"], one["maximum"]) for one in depths["anyOf"][0]["prefixItems"]} == {(1, 256)}
    assert "minimum" not in depths


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--evaluation.window=[64, 64]", "--evaluation.stride=[65, 1]"],
            r"evaluation\.stride must be at most .*\(64, 64\)",
        ),
        (
            ["--model.hidden_sizes=[33, 64, 160, 256]", "--model.num_attention_heads=[2, 2, 5, 8]"],
            r"model\.hidden_sizes must be multiples of model\.num_attention_heads \(2, 2, 5, 8\)",
        ),
        (["--source.resize=[100000, 200000]"], r"source\.resize must be at most 33554432 pixels"),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)


def test_a_long_value_is_shown_by_its_beginning():
    with pytest.raises(ValueError, match=r"seed in the command line must be a whole number, got ") as caught:
        load_config(None, [f"--seed={'x' * 100_000}"])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("domain", ["source", "target", "target_labelled", "test"])
def test_a_fault_of_a_domain_names_the_domain(domain):
    with pytest.raises(ValueError, match=rf"^{domain}\.num_images must be at least 1, got 0\."):
        load_config(None, [f"--{domain}.num_images=0"])


@pytest.mark.parametrize(
    "section", [item.name for item in fields(RunConfig) if is_dataclass(item.type)] + ["translate.fda"]
)
@pytest.mark.parametrize("value", ["3", "null", "[a]", "text"])
def test_a_section_is_not_a_value(load, section, value):
    with pytest.raises(ValueError, match=rf"^{re.escape(section)} in .* is a section.* keys: {re.escape(section)}\."):
        load(section, value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", ["must map keys to values", "list"]),
        ("just words", ["must map keys to values", "str"]),
        ("optim: {lr: 1", ["is not valid YAML"]),
        ("a: b: c", ["is not valid YAML"]),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.yaml") as caught:
        load_config(path)
    assert all(word in str(caught.value) for word in words)


AGAIN = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 8)}]\n" for level in range(1, 12)
)
LOOKS_OTHERWISE = {
    "twice": ("seed: 1\noptim: {lr: 1.0e-4}\nseed: 2\n", "line 3: 'seed' is given twice"),
    "twice, of a mapping": ("source:\n  path: a\n  path: a\n", "line 3: 'path' is given twice"),
    "twice in a line": ("optim: {lr: 1.0, lr: 2.0}\n", "line 1: 'lr' is given twice"),
    "nested and dotted": ("optim: {lr: 1.0}\noptim.lr: 2.0\n", "optim.lr is given twice in .*mine.yaml"),
    "octal": ("output_dir: x\nseed: 010\n", "line 2: 010 is 8 to YAML"),
    "octal, as an id": ("source:\n  label_ids: {007: road, 008: sky}\n", "line 2: 007 is 7 to YAML"),
    "sexagesimal": ("seed: 1:30\n", "line 1: 1:30 is 90 to YAML"),
    "sexagesimal, with a fraction": ("optim:\n  lr: 0:30.5\n", "line 2: 0:30.5 is 30.5 to YAML"),
    "too long": (f"seed: {'1' * 5000}\n", "line 1: 1111111111... is too long"),
    "a circle": ("traget: &s {a: *s}\n", r"line 1: \*s stands inside of what &s names"),
    "a circle in a list": ("classes: &c [road, *c]\n", r"line 1: \*c stands inside of what &c names"),
    "aliases of aliases": (AGAIN, "line 6: more than 100000 values"),
    "deep": ("classes: " + "[" * 5000, "line 1: more than 100000 values, or than 32 levels"),
    "no alias": ("seed: *other\n", "line 1 is not valid YAML: found undefined alias 'other'"),
    "a tag": ("seed: !!python/object/apply:os.getpid []\n", "line 1 is not valid YAML: could not determine a"),
    "no number": ("seed: !!int x\n", "is not valid YAML: invalid literal"),
}


@pytest.mark.parametrize(("text", "message"), LOOKS_OTHERWISE.values(), ids=LOOKS_OTHERWISE)
def test_what_is_read_otherwise_than_it_looks_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_anchors_and_texts_that_look_like_numbers_or_dates_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "source: &both {path: photos, class_names: ['010', '1:30', 2020-01-01]}\ntest: {<<: *both, path: other}\n",
        encoding="utf-8",
    )
    cfg = load_config(path)
    assert cfg.test.class_names == cfg.source.class_names == ("010", "1:30", "2020-01-01")
    assert (cfg.source.path, cfg.test.path) == ("photos", "other")


def test_a_flag_may_be_given_twice_and_the_last_one_wins():
    assert load_config(None, ["--seed=1", "--seed=2"]).seed == 2


ARCHITECTURE = "translate.trained.architecture"


@pytest.mark.parametrize("text", [f"{ARCHITECTURE}: os:system", "translate: {trained: {architecture: os:system}}"])
def test_no_file_names_code_to_run(tmp_path, text):
    for name, content in {"mine": text, "heir": "base: ./mine.yaml\nseed: 1"}.items():
        (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"^{ARCHITECTURE} in .*mine\.yaml names code to run, 'os:system'"):
            load_config(tmp_path / f"{name}.yaml")
    assert load_config(tmp_path / "mine.yaml", record=True).translate.trained.architecture == "os:system"
    flag = f"--{ARCHITECTURE}=torch.nn:Identity"
    assert load_config(tmp_path / "mine.yaml", [flag]).translate.trained.architecture == "torch.nn:Identity"


def test_a_file_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"output_dir: Stra\xdfe\n")
    with pytest.raises(ValueError, match=r"latin\.yaml is not a text in UTF-8"):
        load_config(path)


@pytest.mark.parametrize("name", ["a" * 5000, "nul\0"])
def test_what_is_no_name_of_a_file_is_refused(name):
    with pytest.raises(ValueError, match=r"does not exist"):
        load_config(name)


def test_a_base_that_is_missing_says_who_names_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: nope\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^base in .*mine\.yaml: config file 'nope' does not exist"):
        load_config(path)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"'nowhere\.yaml' does not exist\. Give the path"):
        load_config("nowhere.yaml")


def test_a_key_below_a_value_is_unknown():
    with pytest.raises(ValueError, match=r"unknown key 'optim\.lr\.value' .* Keys there are optim\.lr, "):
        load_config(None, ["--optim.lr.value=1"])


@pytest.mark.parametrize("arguments", [["seed", "3"], ["-seed", "3"], ["--seed"], ["--seed", "3", "extra"], ["3"]])
def test_what_is_not_key_and_value_is_refused(arguments):
    with pytest.raises(ValueError, match="expected --key value on the command line, got"):
        load_config(None, arguments)


def test_a_broken_value_on_the_command_line_names_its_key():
    with pytest.raises(ValueError, match=r"--data\.crop_size is not valid YAML"):
        load_config(None, ["--data.crop_size", "[64, 128"])


NOTHING = "--loss_weights={source: 0, feature_distance: 0, target: 0, pull: 0}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([NOTHING], r"loss_weights\.source or .* or loss_weights\.masked_consistency must be positive .* nothing is"),
        (["--method=source_only", "--loss_weights.source=0"], r"loss_weights\.source must be positive with method so"),
        (
            ["--balance.doubt=1", "--loss_weights.target=0"],
            r"balance\.doubt must be 0 when .* no pseudo-labels",
        ),
        (
            ["--uda.pseudo_labels=soft", "--loss_weights.target=0"],
            r"uda\.pseudo_labels must be hard when .* no pseudo-",
        ),
        (["--train.max_steps=9999999999"], r"train\.max_steps must be in \[1, 1000000000\]"),
        (["--classes=[road, mIoU]"], r"classes must be other names than mIoU"),
        (["--drw.apply_to=target", "--loss_weights.target=0"], r"drw\.apply_to must be pull or none when .* Or give"),
        (["--pull.start_step=9", "--train.max_steps=9"], r"pull\.start_step must be below train\.max_steps 9\. For a"),
        (["--uda.source_phase=0.5", "--loss_weights.source=0"], r"uda\.source_phase must be 0 when loss_weights\.sour"),
        (
            ["--uda.target_statistics=8", "--target={path: a/b, streaming: true}"],
            r"uda\.target_statistics must be 0 with a target that is streamed without num_images",
        ),
        (["--projector.in_index=[]"], r"null takes the encoder's usual ones; for a run without a pull set loss_weigh"),
    ],
)
def test_a_run_that_cannot_mean_anything_is_refused_with_what_to_change(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)


def test_what_a_run_without_a_pull_does_not_read_is_not_looked_at():
    """The baselines keep the defaults of T2S-DA: re-weighting of a pull that has no weight."""
    assert load_config(None, ["--loss_weights.pull=0", "--pull.start_step=50_000"]).drw.apply_to == "pull"


def test_margins_must_leave_rows():
    with pytest.raises(
        ValueError, match=r"uda\.ignore_top \+ uda\.ignore_bottom must be less than .* 96 rows.*got 135"
    ):
        load_config(None, ["--data.crop_size=[96, 128]", "--uda.ignore_top=15", "--uda.ignore_bottom=120"])
    assert load_config(None, ["--uda.ignore_bottom=600"]).data.crop_size is None  # nobody knows yet


def test_a_crop_lies_in_its_window():
    with pytest.raises(ValueError, match=r"data\.outer_crop_size must be at least data\.crop_size \(512, 512\)"):
        load_config(None, ["--data.crop_size=[512, 512]", "--data.outer_crop_size=[256, 1024]"])


def test_pixels_of_rare_classes_are_one_number_or_one_for_each_class():
    classes = "--classes=[road, sky]"
    assert load_config(None, [classes, "--rcs.min_pixels=[5, 0]"]).rcs.min_pixels == (5, 0)
    for wrong in ("[5]", "[5, -1]"):
        with pytest.raises(ValueError, match=r"rcs\.min_pixels must be"):
            load_config(None, [classes, f"--rcs.min_pixels={wrong}"])


# --------------------------------------------------------------------------------- messages cover every key there is


def test_every_key_refuses_a_value_of_a_wrong_type():
    """So no field has a type that the check does not know."""
    for key in leaves(RunConfig()):
        with pytest.raises(ValueError, match=rf"^{re.escape(key)} in the command line must be "):
            load_config(None, [f"--{key}={{a: [b]}}"])


def test_every_key_accepts_its_default():
    for key, value in leaves(RunConfig()).items():
        text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
        assert load_config(None, [f"--{key}={text.removesuffix('...' + chr(10))}"]) == RunConfig(), key


# ---------------------------------------------------------------------------------------------- what follows from it


@pytest.mark.parametrize(
    ("overrides", "translates"),
    [
        ([], True),
        (["--loss_weights.pull=0"], False),
        (["--loss_weights.pull=0", "--mix.source=pseudo_target"], True),
        (["--translate.engine=none"], False),
        (["--method=source_only"], False),
    ],
)
def test_a_run_translates_only_where_the_objective_needs_it(overrides, translates):
    cfg = load_config(None, overrides)
    assert cfg.translates == translates
    assert cfg.uses_outer_crop == translates
    for choice in ("true", "false"):
        assert replace(cfg, data=replace(cfg.data, outer_crop=choice)).uses_outer_crop == (choice == "true")


def test_differences_are_those_of_values_whatever_the_form_and_the_age_of_a_file():
    cfg = load_config(None, ["--optim.lr=1", "--source.label_map={wall: building}", "--data.crop_size=[32, 64]"])
    expected = {
        "data.crop_size": (None, [32, 64]),
        "optim.lr": (6e-5, 1.0),
        "source.label_map.wall": (None, "building"),
    }
    assert differences(asdict(RunConfig()), asdict(cfg)) == expected
    assert differences({}, yaml.safe_load(dump_config(cfg))) == expected
    old = {"optim.lr": 1, "model.encoder_ln_eps_fix": False, "source": {"drawing_seed": 0, "label_map": {}}}
    assert differences(old, asdict(cfg)) == {key: value for key, value in expected.items() if key != "optim.lr"} | {
        "model.encoder_ln_eps_fix": (False, True)
    }


@pytest.mark.parametrize(
    ("target", "test", "taken"),
    [
        ({"path": "a"}, {"path": "a"}, {"label_space": "camvid", "label_path": "maps", "ignore_id": 3}),
        ({"path": "a", "label_path": "own"}, {"path": "a"}, {"label_space": "camvid", "label_path": "own"}),
        ({"path": "a", "ignore_id": 5}, {"path": "a"}, {"label_space": "", "label_path": "maps", "ignore_id": 5}),
        ({"path": "a"}, {"path": "b"}, {"label_space": "", "label_path": "", "ignore_id": None}),
        (
            {"path": "a", "layout": "cityscapes"},
            {"path": "b", "layout": "cityscapes"},
            {"label_space": "camvid", "label_path": "", "ignore_id": 3},
        ),
    ],
)
def test_labels_of_a_target_are_described_by_it_or_by_the_test_of_the_same_place(target, test, taken):
    described = {"label_space": "camvid", "label_path": "maps", "ignore_id": 3}
    given = [f"--target={json.dumps(target)}", f"--test={json.dumps(test | described)}", "--source.path=s"]
    bound = load_config(None, [*given, "--method=target_only"])
    assert (bound.labels_from, bound.supervised, bound.translates) == ("target", True, False)
    assert {name: getattr(bound.labelled, name) for name in taken} == taken
    assert bound.labelled.path == bound.target.path == "a"
    assert load_config(None, given).labelled.path == "s"
    with pytest.raises(ValueError, match="baseline must be none with method target_only"):
        load_config(None, [*given, "--method=target_only", "--baseline=source_only"])


def test_own_class_names_need_no_label_space():
    assert DomainConfig(label_space="mine", class_names=("a", "b")).class_names == ("a", "b")
    with pytest.raises(ValueError, match=r"^label_space must be one of .*'mine'.* list their names in class_names"):
        DomainConfig(label_space="mine")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("data/game/images", "data/photos/images", "data/checked/pairs.csv"), ("game", "photos", "checked")),
        (("/a/x/images", "/b/x/images", "/b/x/images"), ("a/x", "b/x", "b/x")),
        (("data/city/train", "data/city/val", "data/city/test"), ("city/train", "city/val", "city/test")),
        (
            ("streets-source", "streets-target", "streets-target"),
            ("streets-source", "streets-target", "streets-target"),
        ),
        (("me/game", "", "/home/me/photos.parquet"), ("me/game", "", "photos")),
    ],
)
def test_domains_have_names_that_say_something(paths: tuple[str, ...], names: tuple[str, ...]) -> None:
    tree = {role: {"path": path} for role, path in zip(("source", "target", "test"), paths, strict=True)}
    assert tuple(domain_names(tree).values()) == names
    assert domain_names(tree | {"target": {"path": paths[1], "name": "mine"}})["target"] == "mine"


def test_only_what_looks_like_a_data_set_of_the_hub_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "city").mkdir(parents=True)
    assert hub_id({"path": "me/city"}) == "me/city"
    for domain in ({"path": "data/city"}, {"path": "me/a.parquet"}, {"path": "me/city", "label_path": "x"}, {}):
        assert hub_id(domain) == ""


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("target: {path: ~/photos}\nmodel: {pretrained: ~}")
    (tmp_path / "run.yaml").write_text("base: ~/base.yaml\noutput_dir: ~/out\nclasses: ['~/road', sky]\n")
    config = load_config(tmp_path / "run.yaml", ["--source.path=~/game", "--test.path", "a~/b", "--seed", "3"])
    assert (config.target.path, config.output_dir) == (f"{tmp_path}/photos", f"{tmp_path}/out")
    assert (config.source.path, config.test.path) == (f"{tmp_path}/game", "a~/b")
    assert (config.classes, config.model.pretrained) == (("~/road", "sky"), None)

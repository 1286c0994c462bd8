"""Trained translators: networks from folders, and folders of translated images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from data.test_domains import bomb
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from torch import Generator, Tensor, nn

from t2sda_hf.cli import main
from t2sda_hf.commands.translator import CAPTION
from t2sda_hf.config import DomainConfig, TrainedConfig, TranslateConfig
from t2sda_hf.data.domains import load_domain
from t2sda_hf.data.pairs import PairDataset
from t2sda_hf.data.translated import open_translated, write_manifest
from t2sda_hf.training.translator import TranslatorSettings, train_translator
from t2sda_hf.translate import build_engine
from t2sda_hf.translate.generator import TranslationGenerator, load_translator, save_translator
from t2sda_hf.translate.trained import NetworkTranslation

OURS = TrainedConfig().architecture


def random(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def images(height: int = 33, width: int = 48) -> Tensor:
    return torch.rand(2, 3, height, width, generator=random(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = TranslationGenerator(width=4, num_blocks=1)
    nn.init.normal_(network.change.weight, std=0.05)
    save_translator(tmp_path / "translator", network, {"width": 4, "num_blocks": 1})
    return tmp_path / "translator"


def test_a_new_generator_changes_nothing_and_keeps_any_size():
    for size in ((16, 16), (33, 50), (18, 31)):
        torch.testing.assert_close(TranslationGenerator(4, 1)(images(*size)), images(*size), rtol=0, atol=1e-6)


def test_a_saved_translator_is_the_engine(folder):
    engine = build_engine(TranslateConfig(engine="trained", trained=TrainedConfig(model=str(folder))))
    network = TranslationGenerator(4, 1)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        expected = network(images()).clamp(0, 1)
    assert not torch.equal(expected, images())
    assert torch.equal(engine(images(), None, random()), expected)
    assert not any(parameter.requires_grad for parameter in engine.network.parameters())


def test_any_module_class_will_do(tmp_path):
    """A 1x1 convolution that swaps red and blue."""
    save_file({"weight": torch.eye(3).flip(0).view(3, 3, 1, 1)}, tmp_path / "model.safetensors")
    config = {"in_channels": 3, "out_channels": 3, "kernel_size": 1, "bias": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trained = TrainedConfig(model=str(tmp_path), architecture="torch.nn:Conv2d")
    engine = build_engine(TranslateConfig(engine="trained", trained=trained))
    torch.testing.assert_close(engine(images(), None, random()), images().flip(1))


def test_a_network_that_changes_the_size_is_refused():
    with pytest.raises(ValueError, match=r"made \(2, 3, 16, 24\) of \(2, 3, 32, 48\). It must keep the size"):
        NetworkTranslation(nn.AvgPool2d(2))(images(32), None, random())


@pytest.mark.parametrize(
    "architecture",
    ["torch.nn:Nothing", "no_such_package:Net", "torch.nn", "", "os:system", "torch:load", "t2sda_hf.config:RunConfig"],
)
def test_what_is_no_class_of_a_network_is_named(folder, architecture):
    with pytest.raises(ValueError, match=r"architecture must be package\.module:Class"):
        load_translator(str(folder), architecture)


def test_what_is_in_no_installed_package_is_not_even_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "mine_here.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="no installed package has a module 'mine_here'"):
        load_translator(str(folder), "mine_here:Net")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("arguments", [{"num_blocks": 1_000_000}, {"width": 1_000_000}, {"width": 0}])
def test_a_network_of_any_size_is_not_built_for_a_stranger(folder, arguments):
    (folder / "config.json").write_text(json.dumps(arguments))
    with pytest.raises(ValueError, match=rf"config\.json .*{next(iter(arguments))} must be a whole number from 1 to"):
        load_translator(str(folder), OURS)


def test_arguments_that_do_not_fit_the_class_are_named(folder):
    (folder / "config.json").write_text(json.dumps({"wdith": 4}))
    with pytest.raises(ValueError, match=r"config\.json does not hold the arguments of .*'wdith'"):
        load_translator(str(folder), OURS)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"no {missing} in"):
        load_translator(str(folder), OURS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("change.bias"), "no change.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda tensors: tensors.update({"change.bias": torch.zeros(4)}), r"change.bias is \(4,\), wanted \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_translator(str(folder), OURS)


@pytest.mark.parametrize("given", [{}, {"model": "a", "folder": "b"}])
def test_either_a_model_or_a_folder(given):
    with pytest.raises(ValueError, match=r"either model .* or folder"):
        TranslateConfig(engine="trained", trained=TrainedConfig(**given))


def exported(tmp_path: Path, num: int = 3) -> Path:
    """Translations of drawn streets: the source in negative, at half its size."""
    folder = tmp_path / "translated"
    folder.mkdir()
    domain = load_domain(DomainConfig(path="streets-source", num_images=num), labelled=False)
    names = [f"{index:06d}.png" for index in range(num)]
    for index, name in enumerate(names):
        Image.fromarray(255 - domain.image(index)).save(folder / name)
    write_manifest(folder, names, {"engine": "negative"})
    return folder


def test_a_folder_is_read_in_the_order_of_the_rows(tmp_path):
    translated = open_translated(str(exported(tmp_path)), 3)
    domain = load_domain(DomainConfig(path="streets-source", num_images=3), labelled=False)
    for index in range(3):
        assert np.array_equal(translated.image(index), 255 - domain.image(index))


def test_a_folder_that_does_not_fit_the_domain_is_refused(tmp_path):
    folder = exported(tmp_path)
    with pytest.raises(ValueError, match="lists 3 images, and the source domain has 4"):
        open_translated(str(folder), 4)
    (folder / "000001.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the files in its manifest: 000001\.png"):
        open_translated(str(folder), 3)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        open_translated(str(folder), 3)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../secret.png"], "names '../secret.png', which lies outside its folder: nothing is opened"),
        (["link.png"], "names 'link.png', which lies outside its folder"),
        (["/etc/passwd"], "names '/etc/passwd', which lies outside its folder"),
        (["bomb.png"], r"bomb.png has 6000x6000 pixels, more than source.max_pixels \(33554432\)"),
        (["huge.png"], "huge.png is far too large"),
        (["text.png"], "text.png cannot be read"),
        ([1], 'has no list "files" of names'),
        ({"a": 1}, 'has no list "files" of names'),
    ],
)
def test_a_manifest_of_somebody_else_names_only_images_of_its_folder(names, message, tmp_path):
    folder = exported(tmp_path, 1)
    (tmp_path / "secret.png").write_bytes((folder / "000000.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "bomb.png").write_bytes(bomb(6000, bits=1))
    (folder / "huge.png").write_bytes(bomb(20_000, bits=1))
    (folder / "text.png").write_text("no picture")
    (folder / "manifest.json").write_text(json.dumps({"files": names}))
    with pytest.raises(ValueError, match=message):
        open_translated(str(folder), 1)


@pytest.mark.parametrize("resize", ["null", "[48, 96]"])
def test_translated_windows_are_cut_and_flipped_with_their_source(tmp_path, resize):
    """With negatives as translations, source and translation add up to white wherever the crop lies."""
    folder = exported(tmp_path)
    cfg = tiny_config(
        "--translate={engine: trained, trained: {folder: " + str(folder) + "}}",
        "--source={path: streets-source, num_images: 3, resize: " + resize + ", resize_mode: exact}",
        "--target={path: streets-target, num_images: 2}",
        "--rcs.enabled=false",
    )
    source, target = load_domain(cfg.source, cfg.classes), load_domain(cfg.target, cfg.classes, labelled=False)
    dataset = PairDataset(cfg, source, target, None, open_translated(str(folder), 3))
    for position in range(8):
        sample = dataset[position]
        total = sample["outer_source"].astype(int) + sample["style_reference"].astype(int)
        assert np.abs(total - 255).max() <= 1  # rounding of the resize
        top, left = sample["inner_corner"]
        inner = sample["style_reference"][top:, left:][: cfg.data.crop_size[0], : cfg.data.crop_size[1]]
        assert np.abs(inner.astype(int) + sample["source_images"] - 255).max() <= 1
    engine = build_engine(cfg.translate)
    style = torch.rand(1, 3, 4, 4)
    assert torch.equal(engine(torch.zeros(1, 3, 4, 4), style, random()), style)
    with pytest.raises(ValueError, match="loader's translated windows"):
        engine(style, None, random())


def test_train_preview_and_apply_fit_together(tmp_path, capsys):
    """A few steps on drawn streets, then a sheet and a folder of what the trained network does."""
    out = tmp_path / "translator"
    arguments = ["translator", "train", "--source", "streets-source", "--target", "streets-target"]
    arguments += [
        "--output",
        str(out),
        "--steps",
        "3",
        "--crop",
        "32",
        "64",
        "--width",
        "4",
        "--blocks",
        "1",
        "--lr",
        "0.01",
    ]
    assert main(arguments) == 0
    facts = json.loads((out / "training.json").read_text())
    assert facts["settings"]["steps"] == 3
    assert np.isfinite(facts["log"][-1]["generators"])
    assert (out / "preview.png").is_file()
    assert torch.equal(
        load_translator(str(out), OURS)(images()), load_translator(str(out), OURS)(images())
    )  # no state is kept
    assert not torch.equal(load_translator(str(out), OURS)(images()), images())
    assert not torch.equal(
        load_translator(str(out / "backward"), OURS)(images()), load_translator(str(out), OURS)(images())
    )
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err

    run = tmp_path / "run.yaml"
    run.write_text("source: {path: streets-source, num_images: 2}\ntarget: {path: streets-target, num_images: 1}\n")
    shared = ["--config", str(run), "--set", f"translate.trained.model={out}", "--engine"]
    sheet = tmp_path / "sheet.png"
    assert main(["translator", "preview", *shared, "fda", "trained", "none", "--output", str(sheet)]) == 0
    with Image.open(sheet) as picture:
        assert picture.size == (2 * 192, 5 * (96 + CAPTION))  # source, target, three engines
    folder = tmp_path / "translated"
    apply = ["translator", "apply", *shared, "trained", "--output", str(folder)]
    assert main(apply) == 0
    translated = open_translated(str(folder), 2)
    original = load_domain(DomainConfig(path="streets-source", num_images=2), labelled=False).image(1)
    whole = torch.from_numpy(original).permute(2, 0, 1)[None].float() / 255
    expected = load_translator(str(out), OURS)(whole).clamp(0, 1)[0].permute(1, 2, 0) * 255
    assert np.abs(translated.image(1) - expected.numpy()).max() <= 0.51
    assert main(apply) == 2
    inside = folder / "more"
    assert main([*apply[:-1], str(inside), "--target.path", str(folder)]) == 2
    assert f"{inside} lies in {folder}, which is read as data" in capsys.readouterr().err


class Blocks:
    """Pictures of eight by eight coloured squares, of a tint."""

    def __init__(self, name: str, tint: tuple[float, float, float]) -> None:
        self.name, self.tint = name, np.array(tint)

    def __len__(self) -> int:
        return 32

    def resized_image(self, index: int) -> np.ndarray:
        squares = np.random.default_rng([len(self.name), index]).integers(60, 255, (8, 8, 3))
        return (squares.repeat(8, 0).repeat(8, 1) * self.tint).astype(np.uint8)


def test_a_trained_translator_gives_the_source_the_tint_of_the_target(tmp_path):
    source, target = Blocks("source", (1, 1, 1)), Blocks("the target", (0.7, 0.5, 0.5))
    settings = TranslatorSettings(steps=120, batch_size=2, crop_size=(32, 32), lr=2e-3, width=4, num_blocks=1, seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number adds in another order, and 120 updates of a GAN make much of that
    try:
        train_translator(settings, source, target, tmp_path / "out", Accelerator(cpu=True))
    finally:
        torch.set_num_threads(threads)

    def pictures(domain: Blocks) -> Tensor:
        stacked = np.stack([domain.resized_image(index) for index in range(16)])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255

    translated = load_translator(str(tmp_path / "out"), OURS)(pictures(source)).clamp(0, 1)
    means = [images.mean((0, 2, 3)) for images in (pictures(source), translated, pictures(target))]
    assert (means[1] - means[2]).abs().sum() < 0.5 * (means[0] - means[2]).abs().sum(), means
    # The squares are still there: what is bright in a picture stays brighter than what is dark.
    grey = [images.mean(1).flatten(1) for images in (pictures(source), translated)]
    assert min(torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*grey, strict=True)) > 0.8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--crop", "8", "64"], "--crop must be at least 32 32"),
        (["--lr", "0"], "--lr must be a positive number"),
        (["--lr", "inf"], "--lr must be a positive number"),
        (["--source", "nowhere.parquet"], "nowhere.parquet"),
        (["--target", "."], "out lies in "),
    ],
)
def test_training_refuses_in_one_line(tmp_path, capsys, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    arguments = ["translator", "train", "--source", "streets-source", "--target", "streets-target"]
    assert main([*arguments, "--output", str(tmp_path / "out"), *changed]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()

"""Styles of domain generalisation: each against its definition, and what happens when one is not at hand."""

import logging
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from t2sda_hf.config import FdaConfig, StyleConfig, TranslateConfig
from t2sda_hf.translate import build_engine
from t2sda_hf.translate.fda import fda_translate
from t2sda_hf.translate.style import _style_images
from t2sda_hf.translate.style_networks import ADAIN_FILES, RANDOMIZATION_FILES, AdaIN, StyleRandomizer


def random(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def images(num: int = 2, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(num, 3, height, width, generator=random(1))


def build(*styles: str, **values: object) -> object:
    fda = FdaConfig(beta=0.2)
    return build_engine(TranslateConfig(engine="style", fda=fda, style=StyleConfig(styles=styles, **values)))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of the weather corruptions is not installed."""
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)


@pytest.fixture
def paintings(tmp_path: Path) -> Path:
    folder = tmp_path / "paintings" / "one"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0)
    for name, low, high in (("red.png", 100, 255), ("dark.jpg", 0, 60)):
        Image.fromarray(pixels.integers(low, high, (30, 50, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder.parent


def picture(path: Path, size: tuple[int, int]) -> Tensor:
    with Image.open(path) as file:
        image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    return nn.functional.interpolate(image, size, mode="bilinear", antialias=True)


def test_fda_takes_its_amplitude_from_one_of_the_pictures(paintings):
    result = build("fda", images=str(paintings))(images(8), None, random())
    files = [paintings / "one" / name for name in ("dark.jpg", "red.png")]
    expected = [
        fda_translate(images(8), picture(file, (24, 40)).expand(8, -1, -1, -1), 0.2).clamp(0, 1) for file in files
    ]
    used = [
        [torch.allclose(result[index], styled[index], atol=1e-5) for styled in expected].index(True)
        for index in range(8)
    ]
    assert set(used) == {0, 1}


def test_bytes_of_a_painting_start_no_program(tmp_path):
    """Pillow would hand an EPS to Ghostscript, whatever its file is called."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(
        ValueError, match=r"translate.style.images: .*a.png cannot be read as an image.*cannot identify"
    ):
        build("fda", images=str(tmp_path))


def test_pictures_are_read_as_those_of_a_domain(tmp_path):
    """Upright; one that would end the training in a step is refused before it."""
    upright = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "turned.png", exif=exif)
    found = _style_images(TranslateConfig(style=StyleConfig(images=str(tmp_path)))).image(0, (30, 50))
    torch.testing.assert_close(found, torch.from_numpy(upright).permute(2, 0, 1)[None].float() / 255)
    for data, message in (
        ((tmp_path / "turned.png").read_bytes()[:3000], "is cut or damaged"),
        (b"", "is an empty file"),
    ):
        (tmp_path / "z.png").write_bytes(data)
        with pytest.raises(ValueError, match=rf"translate.style.images: .*z.png {message}.*take it out of the folder"):
            build("fda", images=str(tmp_path))


def test_pictures_are_read_once(paintings):
    """What FDA needs of a picture is kept, so it works on when the picture is gone."""
    engine = build("fda", images=str(paintings))
    first = engine(images(16), None, random())
    for path in paintings.rglob("*.*"):
        path.unlink()
    assert torch.equal(engine(images(16), None, random()), first)


def test_every_style_gets_its_share(paintings):
    """One style is drawn per image; with one style the draw is the only difference."""
    engine = build("fda", "cartoon", images=str(paintings))
    calls: list[str] = []
    for name, style in list(engine.styles.items()):
        engine.styles[name] = lambda image, generator, name=name, style=style: (calls.append(name), image)[1]
    assert torch.equal(engine(images(400, 2, 2), None, random()), images(400, 2, 2))
    assert calls.count("fda") / 400 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("style", ["weather", "cartoon"])
def test_styles_without_files_change_the_look_and_keep_the_range(plain, style):
    engine = build(style)
    source = images(3, 40, 50)
    results = [engine(source, None, random(seed)) for seed in range(12)]
    for result in results:
        assert result.shape == source.shape
        assert 0 <= result.min() <= result.max() <= 1
        assert (result - source).abs().flatten(1).mean(1).min() > 0.005
    assert len({float(result.sum()) for result in results}) > 6


def test_plain_brightness_adds_to_the_value_and_fog_flattens(plain):
    """A uniform grey shows both: brighter by a tenth times the severity, or mixed with clouds below its own value."""
    engine, grey = build("weather"), torch.full((1, 3, 16, 16), 0.4)
    steps, fogs = set(), 0
    for seed in range(60):
        result = engine(grey, None, random(seed))
        if result.std() < 1e-6:
            steps.add(round(float(result.mean() - 0.4), 4))
        else:
            fogs += 1
            assert result.max() <= 0.4 + 1e-6
    assert steps == {0.1, 0.2, 0.3, 0.4, 0.5}
    assert 15 < fogs < 45


@pytest.mark.parametrize("brighter", [20, 25])
def test_the_cartoon_evens_out_noise_and_draws_lines_at_edges(brighter):
    source = torch.full((1, 3, 40, 40), 0.3)
    source[..., brighter:] = 0.9
    noisy = source + 0.02 * torch.randn(source.shape, generator=random())
    result = build("cartoon")(noisy.clamp(0, 1), None, random())
    assert result[..., 3:17, 3:17].std() < 0.7 * noisy[..., 3:17, 3:17].std()
    assert result[..., brighter - 1 : brighter + 1].max() < 0.1  # the line, on both sides of the edge
    assert result[..., : brighter - 3].mean() == pytest.approx(0.3, abs=0.05)
    assert result[..., brighter + 3 :].mean() == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("size", [(32, 32), (33, 200), (200, 33), (64, 64), (96, 128)])
def test_an_even_image_stays_even_in_a_cartoon(size):
    """A filter that reaches further than the image would make it black."""
    even = torch.full((8, 3, *size), 0.4)
    torch.testing.assert_close(build("cartoon")(even, None, random()), even)


def test_weather_gets_bytes_and_a_seed_of_the_generator(monkeypatch):
    """The package is asked for one of its corruptions; it gives back a darker picture, and what numpy would draw."""
    calls: list[tuple] = []

    def corrupt(pixels: np.ndarray, severity: int, corruption_name: str) -> np.ndarray:
        drawn = np.random.randint(2**31)  # noqa: NPY002
        calls.append((corruption_name, severity, drawn, pixels.dtype, pixels.shape, pixels.flags.c_contiguous))
        return pixels // 2

    package = ModuleType("imagecorruptions")
    package.corrupt = corrupt
    package.get_corruption_names = {"weather": ["snow", "frost", "fog", "brightness"]}.get
    monkeypatch.setitem(sys.modules, "imagecorruptions", package)
    engine = build("weather")
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    result = engine(images(60), None, random())
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    torch.testing.assert_close(result, ((images(60) * 255).round().int() // 2).float() / 255)
    kinds, severities, draws, types, shapes, contiguous = zip(*calls, strict=True)
    assert set(kinds) == {"snow", "frost", "fog", "brightness"}
    assert set(severities) == {1, 2, 3, 4, 5}
    assert len(set(draws)) == 60
    assert set(types) == {np.dtype(np.uint8)}
    assert set(shapes) == {(24, 40, 3)}
    assert all(contiguous)
    first = calls.copy()
    calls.clear()
    engine(images(60), None, random())
    assert calls == first


def test_the_four_kinds_of_weather_themselves():
    pytest.importorskip("imagecorruptions", reason="needs pip install 't2sda_hf[styles]'")
    engine, source = build("weather"), images(24, 48, 64)
    result = engine(source, None, random())
    assert (result - source).abs().flatten(1).mean(1).min() > 0.01
    assert 0 <= result.min() <= result.max() <= 1
    assert torch.equal(engine(source, None, random()), result)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as they are published, with random weights: one kind as safetensors, the other as .pth."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    adain, randomizer = AdaIN(), StyleRandomizer()
    later = {"53.weight": torch.zeros(1)}  # the published encoder goes on after the last layer that is used
    save_file(adain.encoder.state_dict() | later, folder / "vgg_normalised.safetensors")
    torch.save(adain.decoder.state_dict(), folder / "decoder.pth")
    torch.save({"state_dict_ghiasi": randomizer.transformer.state_dict()}, folder / "checkpoint_transformer.pth")
    predictor = {name: value for name, value in randomizer.predictor.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict_stylepredictor": predictor}, folder / "checkpoint_stylepredictor.pth")
    spread = torch.randn(100, 100) / 10
    embeddings = {"pbn_embedding_mean": torch.randn(100), "pbn_embedding_covariance": spread @ spread.T}
    save_file(embeddings, folder / "checkpoint_embeddings.safetensors")
    return folder


def test_adain_gives_features_the_statistics_of_the_picture(weights, paintings):
    (paintings / "one" / "dark.jpg").unlink()
    engine = build("adain", images=str(paintings), adain=str(weights))
    result = engine(images(1, 30, 42), None, random())
    network = AdaIN.load({name: next(weights.glob(f"{name}.*")) for name in ADAIN_FILES})
    style = picture(paintings / "one" / "red.png", (30, 42))
    torch.testing.assert_close(result, network(images(1, 30, 42), style).clamp(0, 1))
    # Statistics by hand: the decoder replaced by nothing shows the features it is given.
    network.decoder = nn.Identity()
    content, wanted = images(1, 32, 40), images(1, 24, 24) ** 2
    mixed, target = network(content, wanted), network.encoder(wanted)
    torch.testing.assert_close(mixed.mean((2, 3)), target.mean((2, 3)))
    # 1e-5 is added to variances, which are as small as that with random weights.
    ratio = (target.var((2, 3)) + 1e-5) / (network.encoder(content).var((2, 3)) + 1e-5)
    torch.testing.assert_close(mixed.var((2, 3)), network.encoder(content).var((2, 3)) * ratio)


def test_randomisation_mixes_a_drawn_embedding_with_the_images_own(weights):
    """The embedding is read off the transformer's input; its distribution is that of the paintings."""
    network = StyleRandomizer.load({name: next(weights.glob(f"{name}.*")) for name in RANDOMIZATION_FILES})
    seen: list[Tensor] = []
    network.transformer.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    own = network.predictor(images(1, 80, 80))
    for share in (0.0, 0.5, 1.0):
        result = network(images(1, 80, 80), share, random(4))
        assert result.shape == (1, 3, 80, 80)
        assert 0 < result.min() <= result.max() < 1
    torch.testing.assert_close(seen[0], own)
    torch.testing.assert_close(seen[1], (seen[0] + seen[2]) / 2)
    drawn = torch.randn(20000, 100, generator=random()) @ network.root.T + network.mean
    covariance = network.root @ network.root.T
    torch.testing.assert_close(drawn.mean(0), network.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(drawn.T), covariance, rtol=0, atol=0.1)


def test_randomisation_as_a_style(weights):
    engine = build("randomization", randomization=str(weights))
    first, second = (engine(images(1, 80, 96), None, random(seed)) for seed in (0, 1))
    assert first.shape == (1, 3, 80, 96)
    assert not torch.equal(first, second)


def test_all_five_run_together(weights, paintings, plain, caplog):
    with caplog.at_level(logging.INFO):
        engine = build(*StyleConfig().styles, images=str(paintings), adain=str(weights), randomization=str(weights))
    assert list(engine.styles) == ["fda", "randomization", "adain", "weather", "cartoon"]
    assert "styles: fda, randomization, adain, weather, cartoon" in caplog.text
    result = engine(images(8, 80, 80), None, random())
    assert torch.isfinite(result).all()
    assert not result.requires_grad


def test_what_is_not_at_hand_is_left_out_with_one_line_each(plain, caplog, tmp_path):
    with caplog.at_level(logging.INFO):
        engine = build(*StyleConfig().styles, randomization=str(tmp_path))
    assert list(engine.styles) == ["weather", "cartoon"]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" is ")[0] for line in lines[:4]] == [
        "style fda",
        "style randomization",
        "style adain",
        "style weather",
    ]
    assert f"no {', '.join(RANDOMIZATION_FILES)}" in lines[1]
    assert lines[4] == "styles: weather, cartoon"
    assert all("\n" not in line for line in lines)


def test_weights_of_the_hub_that_cannot_be_had_are_left_out(monkeypatch, paintings):
    """No network: hf_hub_download raises what it raises then."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    engine = build("adain", "fda", images=str(paintings), adain="someone/adain-that-is-not-cached")
    assert list(engine.styles) == ["fda"]


def test_nothing_at_hand_is_a_mistake():
    with pytest.raises(ValueError, match=r"no style to draw from\. style fda is left out: translate\.style\.images"):
        build("fda", "adain")


def test_a_folder_without_pictures_is_a_mistake(tmp_path):
    with pytest.raises(
        ValueError, match=re.escape(f"no image (.png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff) in {str(tmp_path)!r}")
    ):
        build("fda", "cartoon", images=str(tmp_path))


def test_weights_of_another_network_are_a_mistake(weights, paintings, tmp_path):
    for name in ADAIN_FILES:
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"does not fit Sequential: no 0\.weight"):
        build("adain", images=str(paintings), adain=str(tmp_path))


@pytest.mark.parametrize("styles", [(), ("oil",), ("fda", "fda")])
def test_styles_are_some_of_the_five_each_once(styles):
    with pytest.raises(ValueError, match="some of fda, randomization, adain, weather, cartoon"):
        StyleConfig(styles=styles)

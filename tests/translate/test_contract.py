"""What every translation engine promises, over all that `build_engine` knows: a new one is tested by its line there."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Generator, Tensor

from t2sda_hf.config import NEEDS_TARGET, FdaConfig, TrainedConfig, TranslateConfig
from t2sda_hf.translate import ENGINES as BUILDERS
from t2sda_hf.translate import TranslationEngine, build_engine
from t2sda_hf.translate.generator import TranslationGenerator, save_translator

ENGINES = get_args(get_type_hints(TranslateConfig)["engine"])


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that changes images a little."""
    folder = tmp_path_factory.mktemp("translator")
    torch.manual_seed(0)
    network = TranslationGenerator(width=4, num_blocks=1)
    torch.nn.init.normal_(network.change.weight, std=0.01)
    save_translator(folder, network, {"width": 4, "num_blocks": 1})
    return folder


def build(name: str, translator: Path) -> TranslationEngine:
    trained = TrainedConfig(model=str(translator)) if name == "trained" else TrainedConfig()
    return build_engine(TranslateConfig(engine=name, fda=FdaConfig(beta=0.1), trained=trained))


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, translator: Path) -> TranslationEngine:
    return build(request.param, translator)


def random(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def images(num: int = 2) -> tuple[Tensor, Tensor]:
    return torch.rand(num, 3, 33, 48, generator=random(1)), torch.rand(num, 3, 33, 48, generator=random(2)) ** 2


def test_every_engine_that_can_be_named_can_be_built():
    assert {"fda", "none"} <= set(ENGINES)
    assert set(ENGINES) == set(BUILDERS)


@pytest.mark.parametrize("name", sorted(set(ENGINES) - set(NEEDS_TARGET)))
def test_style_from_elsewhere_needs_no_target(name, translator):
    source, style = images()
    engine = build(name, translator)
    assert torch.equal(engine(source, None, random(3)), engine(source, style, random(3)))


def test_fda_without_a_target_is_refused():
    with pytest.raises(ValueError, match="fda takes its style from target images"):
        build_engine(TranslateConfig())(images()[0], None, random())


@pytest.mark.parametrize("num", [1, 3])
def test_shape_and_type_are_those_of_the_source(engine, num):
    source, style = images(num)
    result = engine(source, style, random())
    assert result.shape == source.shape
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()


def test_values_stay_near_the_unit_range(engine):
    result = engine(*images(), random())
    assert result.min() > -0.5
    assert result.max() < 1.5


def test_the_input_is_left_alone(engine):
    source, style = images()
    engine(source, style, random())
    assert torch.equal(source, images()[0])
    assert torch.equal(style, images()[1])


def test_equal_inputs_and_generators_give_equal_outputs(engine):
    assert torch.equal(engine(*images(), random(3)), engine(*images(), random(3)))


def test_no_random_state_but_the_generator_is_used(engine):
    state = torch.get_rng_state()
    first = engine(*images(), random(3))
    torch.manual_seed(123)
    second = engine(*images(), random(3))
    torch.set_rng_state(state)
    engine(*images(), random(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)


def test_no_gradient_is_recorded(engine):
    result = engine(*images(), random())
    assert result.grad_fn is None
    assert not result.requires_grad


def test_pixels_stay_where_they_are(engine):
    """An edge between two halves keeps its place, so labels of the source stay valid."""
    for column in (7, 24, 40):
        source = torch.full((1, 3, 33, 48), 0.2)
        source[..., column:] = 0.8
        result = engine(source, images(1)[1], random())
        steps = result.diff(dim=3).mean(dim=(0, 1, 2))
        assert steps.argmax() == column - 1


def test_images_of_a_batch_do_not_see_each_other(engine):
    """The last image changes; the first must not. (Draws are per image and come in their order.)"""
    source, style = images()
    other_source, other_style = source.clone(), style.clone()
    other_source[1], other_style[1] = 1 - source[1], 1 - style[1]
    first, second = engine(source, style, random()), engine(other_source, other_style, random())
    torch.testing.assert_close(first[0], second[0])


@pytest.mark.parametrize("clip", [False, True])
def test_fda_is_clipped_on_demand_only(clip):
    source, style = images()
    source = (source > 0.5).float()  # at the border of the range, so some values leave it
    result = build_engine(TranslateConfig(fda=FdaConfig(beta=0.1, clip=clip)))(source, style, random())
    assert ((result < 0) | (result > 1)).any() != clip


def test_none_is_the_source():
    source, style = images()
    assert torch.equal(build_engine(TranslateConfig(engine="none"))(source, style, random()), source)

"""What a config leaves open is worked out from the data, by closed forms, and said."""

import re

import numpy as np
import pytest

from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.data.rare_class_sampling import rare_classes
from t2sda_hf.training.derive import (
    DERIVED,
    Facts,
    derive,
    draw_probabilities,
    expected_distinct,
    without_data,
)


def config(*words: str) -> RunConfig:
    return load_config(None, ["--classes=[field, sky, house, ball]", "--train.max_steps=2000", *words])


def pictures(size: tuple[int, int] = (240, 320), target: tuple[int, int] | None = None) -> Facts:
    """120 pictures of four classes: two everywhere, houses in half of them, a small ball in three."""
    height, width = size
    counts = np.zeros((120, 4), np.int64)
    counts[:, :2] = height * width // 2
    counts[::2, 2] = 20_000
    counts[[5, 50, 99], 3] = [900, 500, 60]
    counts[:, 0] -= counts[:, 2] + counts[:, 3]
    sizes = np.tile(size, (120, 1))
    return Facts(counts, sizes, sizes if target is None else np.tile(target, (120, 1)))


def get(cfg: RunConfig, key: str) -> object:
    found: object = cfg
    for part in key.split("."):
        found = getattr(found, part)
    return found


def test_nothing_stays_open_and_what_is_given_stays():
    assert {key for key in DERIVED if get(RunConfig(), key) is None} == set(DERIVED)
    derived = derive(config(), pictures())
    assert set(derived.values) == set(DERIVED)
    assert all(get(derived.cfg, key) == value is not None for key, value in derived.values.items())
    again = derive(derived.cfg, pictures((480, 640)))
    assert again.cfg == derived.cfg
    assert again.values == {}


@pytest.mark.parametrize(
    ("source", "target", "words", "crop", "outer"),
    [
        ((240, 320), (240, 320), [], (224, 320), (240, 320)),
        ((1052, 1914), (1024, 2048), [], (512, 512), (512, 1024)),
        ((1052, 1914), (200, 2048), [], (192, 512), (512, 1024)),
        ((1052, 1914), (1024, 2048), ["--source.resize=[120, 240]"], (96, 192), (120, 218)),
        ((1052, 1914), (1024, 2048), ["--hrda.enabled=true"], (1024, 1024), (1024, 1914)),
        ((240, 320), (240, 320), ["--hrda.enabled=true"], (192, 320), (240, 320)),
        ((240, 320), (240, 320), ["--data.outer_crop_size=[130, 330]"], (128, 320), (130, 330)),
        ((240, 320), (240, 320), ["--data.crop_size=[64, 64]"], (64, 64), (240, 320)),
        ((20, 320), (240, 320), [], (32, 320), (32, 320)),
    ],
)
def test_crops_fit_into_the_images_of_both_domains(source, target, words, crop, outer):
    cfg = derive(config(*words), pictures(source, target)).cfg
    assert cfg.data.crop_size == crop
    assert cfg.data.outer_crop_size == outer
    assert cfg.hrda.crop_size[0] <= crop[0]
    assert cfg.patch_mask.block_size <= min(crop) // 8


def test_one_small_picture_of_many_makes_no_crop_smaller():
    facts = pictures()
    facts.source_sizes[7] = (100, 100)
    derived = derive(config(), facts)
    assert derived.cfg.data.crop_size == (224, 320)
    assert any("1 of 120 source images" in text for text in derived.warnings)


@pytest.mark.parametrize(("updates", "warm_up", "momentum"), [(40_000, 1500, 0.999), (2000, 100, 0.995), (40, 2, 0.9)])
def test_the_schedule_is_a_share_of_the_run(updates, warm_up, momentum):
    cfg = derive(config(f"--train.max_steps={updates}"), pictures()).cfg
    assert cfg.optim.warmup_steps == warm_up
    assert cfg.uda.ema_momentum == momentum
    assert cfg.train.evaluate_every == cfg.train.save_every == max(updates // 10, 100)


def test_as_many_frequencies_are_swapped_as_in_the_papers_window():
    for size, beta in (((1052, 1914), 0.01), ((240, 320), 0.0209), ((64, 64), 0.0782)):
        cfg = derive(config(), pictures(size)).cfg
        assert cfg.translate.fda.beta == beta
        assert int(min(cfg.data.outer_crop_size) * beta) == 5
    small = derive(config("--translate.fda.beta=0.01"), pictures((64, 64)))
    assert any("swaps no frequency" in text for text in small.warnings)


def test_a_floor_is_a_share_of_the_image_and_leaves_half_of_the_images_of_a_class():
    cfg = derive(config(), pictures()).cfg
    assert cfg.rcs.min_pixels == 115
    few = pictures()
    few.counts[[5, 50, 99], 3] = [30, 20, 10]  # two of the three
    floors = derive(config(), few).cfg.rcs.min_pixels
    assert floors == (115, 115, 115, 19)
    assert len(rare_classes(few.counts, 0.01, floors).images[3]) == 2
    gta = derive(config("--source.resize=[720, 1280]"), pictures((1052, 1914))).cfg.rcs
    assert gta.min_pixels[:3] == (3020,) * 3  # DAFormer has 3000
    assert gta.min_crop_ratio == pytest.approx(0.5 * 1280 * 704 / (1914 * 1052), rel=0.01)
    assert cfg.rcs.min_crop_ratio == 0.5


def test_draws_in_closed_form():
    counts = np.array([[10, 0], [10, 10], [10, 0], [10, 0]])
    rare = rare_classes(counts, 1e6, 0)
    p = draw_probabilities(rare, 4)
    assert p == pytest.approx([1 / 8, 1 / 8 + 1 / 2, 1 / 8, 1 / 8], abs=1e-5)
    assert expected_distinct(p, 1) == pytest.approx(1)
    assert expected_distinct(p, 2) == pytest.approx(3 * (1 - (7 / 8) ** 2) + 1 - (3 / 8) ** 2, abs=1e-4)
    drawn = [{rare.draw(np.random.default_rng([s, d]))[0] for d in range(2)} for s in range(2000)]
    assert np.mean([len(images) for images in drawn]) == pytest.approx(expected_distinct(p, 2), abs=0.05)


def test_the_draws_use_the_data_and_no_class_has_them_alone():
    """Three pictures of 120 came up in 4,000 draws with DAFormer's values, all of them for one class."""
    facts = pictures()
    derived = derive(config(), facts)
    rare = rare_classes(facts.counts, derived.cfg.rcs.temperature, derived.cfg.rcs.min_pixels)
    drawn = {rare.draw(np.random.default_rng(seed))[0] for seed in range(4000)}
    assert len(drawn) > 100
    assert rare.probabilities.max() <= 0.5
    (text,) = derived.warnings
    assert re.search(r"about 1\d\d of the 120 source images in 4,000 draws", text)


@pytest.mark.parametrize("words", [["--rcs.temperature=0.01", "--rcs.min_pixels=3000"], ["--rcs.temperature=0.01"]])
def test_draws_below_a_third_of_the_images_are_warned_of_whoever_gave_the_values(words):
    (text,) = derive(config(*words), pictures()).warnings
    assert f"about {2 if len(words) == 1 else 3} of the 120" in text
    assert "100% of them for ball" in text
    assert derive(config(*words, "--rcs.enabled=false"), pictures()).warnings == []


@pytest.mark.parametrize("words", [[], ["--rcs.temperature=0.5", "--rcs.min_pixels=100"]])
def test_a_few_images_that_get_most_draws_are_named(words):
    """All images come up in a long run, but two of them get a quarter of all draws, or more."""
    facts, long = pictures(), "--train.max_steps=100_000"
    derived = derive(config(long, *words), facts)
    rare = rare_classes(facts.counts, derived.cfg.rcs.temperature, derived.cfg.rcs.min_pixels)
    (text,) = derived.warnings
    assert "will draw about 120 of the 120" in text
    assert re.search(rf"; (2[5-9]|[3-9]\d)% of all draws are of the {len(rare.images[3])} images that show ball", text)
    assert ("set rcs.temperature and rcs.min_pixels to null" if words else "No temperature does better") in text
    facts.counts[:60:2, 3] = 1000  # thirty images: none of them is drawn too often
    assert derive(config(long), facts).warnings == []


def test_more_processes_draw_more():
    few = config("--train.max_steps=10")
    one, four = (derive(few, pictures(), processes).warnings[-1] for processes in (1, 4))
    assert "in 20 draws" in one
    assert "in 80 draws" in four


def test_a_crop_beyond_the_images_is_told_with_numbers_and_one_far_beyond_is_refused():
    crop = ["--data.crop_size=[256, 448]", "--data.outer_crop_size=[256, 448]", "--rcs.enabled=false"]
    warnings = derive(config(*crop), pictures()).warnings
    assert len(warnings) == 2  # source and target
    assert all(
        "120 of 120" in text and "240x320" in text and "33% of such a crop is padding" in text for text in warnings
    )
    large = config("--data.crop_size=[512, 512]", "--data.outer_crop_size=[512, 1024]", "--rcs.enabled=false")
    with pytest.raises(ValueError, match=r"data\.outer_crop_size 512x1024.* would be padding\. Set .*: null, and"):
        derive(large, pictures())
    kept = {"data.crop_size": [512, 512], "data.outer_crop_size": [512, 1024]}
    assert len(derive(large, pictures(), kept=kept).warnings) == 2  # a run of an earlier release goes on


def test_advice_is_not_to_set_what_is_set():
    facts = pictures()
    facts.source_sizes[0] = 16, 20
    (text,) = (text for text in derive(config("--rcs.enabled=false"), facts).warnings if "source images" in text)
    assert text.startswith("1 of 120 source images (16x20) are smaller than data.")
    assert text.endswith("padding, from which nothing is learned")
    given = config("--rcs.enabled=false", "--data.crop_size=[256, 448]", "--data.outer_crop_size=[256, 448]")
    (text,) = (text for text in derive(given, facts).warnings if "source images" in text)
    assert text.startswith("120 of 120 source images (in the middle 240x320) are smaller than data.")
    assert text.endswith(": null it is made to fit")


def test_columns_that_are_all_of_an_image_are_refused_and_of_some_told():
    facts = pictures(target=(240, 320))
    with pytest.raises(ValueError, match=r"leave out 320 columns, which is all of 100% of the target images"):
        derive(config("--uda.ignore_left=160", "--uda.ignore_right=160"), facts)
    assert facts.target_sizes is not None
    facts.target_sizes[:60, 1] = 250
    warnings = derive(config("--uda.ignore_left=260"), facts).warnings
    assert any("leave out 260 columns, which is all of 50% of the target images" in text for text in warnings)


def test_rows_that_a_recipe_ignores_are_told_and_never_fill_the_crop():
    (text, _) = derive(config("--uda.ignore_top=15", "--uda.ignore_bottom=120"), pictures()).warnings
    assert "135 of the 224 rows" in text
    assert "no rows ignored" in derive(config(), pictures()).said[0]
    with pytest.raises(ValueError, match=r"ignore_bottom must be less than the crop's 96 rows.* Cityscapes"):
        derive(config("--uda.ignore_top=15", "--uda.ignore_bottom=120"), pictures((100, 320)))


def test_masking_never_hides_the_whole_crop():
    masked = ["--loss_weights.masked_consistency=1"]
    assert derive(config(*masked), pictures()).cfg.patch_mask.block_size == 14
    with pytest.raises(ValueError, match=r"patch_mask\.block_size must be at most half of data\.crop_size"):
        derive(config(*masked, "--patch_mask.block_size=512"), pictures())


def test_a_warm_up_as_long_as_the_run_is_warned_of():
    (text, _) = derive(config("--train.max_steps=40", "--optim.warmup_steps=1500"), pictures()).warnings
    assert "never reaches its base: at most 0.7% of optim.lr" in text


def test_a_run_that_goes_on_keeps_what_it_derived():
    kept = {"optim.warmup_steps": 7, "data.crop_size": [64, 96], "rcs.min_pixels": [1, 2, 3, 4], "seed": 5}
    cfg = derive(config(), pictures(), kept=kept).cfg
    assert (cfg.optim.warmup_steps, cfg.data.crop_size, cfg.rcs.min_pixels) == (7, (64, 96), (1, 2, 3, 4))
    assert cfg.seed == 0
    assert derive(config("--optim.warmup_steps=9"), pictures(), kept=kept).cfg.optim.warmup_steps == 9


def test_without_data_crops_are_those_of_large_images():
    cfg = without_data(config())
    assert (cfg.data.crop_size, cfg.data.outer_crop_size) == ((512, 512), (512, 1024))
    assert without_data(config("--data.crop_size=[2048, 2048]")).data.outer_crop_size == (2048, 2048)


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 0), (3, 2), (4, 3), (16, 8), (96, 8)])
def test_data_is_loaded_by_the_cores_that_do_not_train(cores, workers):
    derived = derive(config(), pictures(), cores=cores)
    assert derived.cfg.data.num_workers == workers
    assert f"{workers} processes load data ahead, of {cores} cores (data.num_workers)" in derived.said
    streamed = derive(config("--target={path: somebody/images, streaming: true}"), pictures(), cores=cores)
    assert streamed.cfg.data.num_workers == {0: 0, 2: 2, 3: 2, 8: 4}[workers]  # divides the lanes of a stream


def test_another_machine_has_its_own_workers_and_a_given_number_stays():
    kept = {"data.num_workers": 3, "optim.warmup_steps": 7}
    derived = derive(config(), pictures(), kept=kept, cores=8)
    assert (derived.cfg.data.num_workers, derived.cfg.optim.warmup_steps) == (7, 7)
    assert derive(config("--data.num_workers=1"), pictures(), cores=8).cfg.data.num_workers == 1

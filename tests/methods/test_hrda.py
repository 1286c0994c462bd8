"""HRDA as a config of the objective (method 1.5, 2.7, 5.9): what runs at which scale, and the two-part loss."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference.hrda as slow
import reference.segmentation as slow_segmentation
import torch
from reference.fda import fda
from reference.samples import listed
from tiny import CLASSES, tiny_batch, tiny_config, tiny_graphs, tiny_networks, tiny_step, together
from torch import Tensor, nn

from t2sda_hf.batch import UdaBatch, normalize
from t2sda_hf.config import RunConfig
from t2sda_hf.data.pairs import PairDataset, collate
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.methods import Graph, Networks
from t2sda_hf.methods.t2sda import fused_and_detail_loss, pseudo_target
from t2sda_hf.models import T2SDAOutput
from t2sda_hf.models.multi_resolution import context_images, cut

CROP, OUTER, DETAIL = (64, 128), (96, 192), (32, 32)
HRDA = [
    f"--data={{crop_size: {list(CROP)}, outer_crop_size: {list(OUTER)}}}",
    f"--hrda={{enabled: true, crop_size: {list(DETAIL)}}}",
    "--model={head_dropout: 0, drop_path_rate: 0}",
]
CONTEXT, SLIDE = (2, 32, 64), (2 * 3 * 7, 32, 32)  # what the encoder sees: (images, height, width)
PART = (2, 32, 32)
PLAIN = "--augment={jitter_probability: 0, blur_probability: 0}"


def hrda_config(*overrides: str) -> RunConfig:
    return tiny_config(*HRDA, *overrides)


def hrda_batch(cfg: RunConfig, **fields: Any) -> UdaBatch:
    """As the loader gives it: corners of the crop are even."""
    batch = replace(tiny_batch(cfg), inner_corner=torch.tensor([[4, 6], [32, 64]]), **fields)
    return replace(batch, source_images=batch.crop_inner(batch.outer_source))


def graphs(
    cfg: RunConfig, networks: Networks | None = None, batch: UdaBatch | None = None, seed: int = 0
) -> Iterator[Graph]:
    return tiny_graphs(cfg, networks, batch or hrda_batch(cfg), seed=seed)


def sizes_seen(network: nn.Module) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    network.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), *args[0].shape[-2:])))
    return seen


def outputs_of(network: nn.Module) -> list[tuple[Tensor, T2SDAOutput]]:
    """A list that fills with the images a network is given and what it returns."""
    seen: list[tuple[Tensor, T2SDAOutput]] = []
    network.register_forward_hook(lambda _, args, output: seen.append((args[0].detach().clone(), output)))
    return seen


# ------------------------------------------------------------------------------------------ what runs at which scale


@pytest.mark.parametrize(
    ("overrides", "student", "teacher", "imagenet"),
    [
        ([], [CONTEXT, PART, CONTEXT, PART, CONTEXT], [CONTEXT, SLIDE, CONTEXT], []),
        (["--loss_weights.pull=0"], [CONTEXT, PART, CONTEXT, PART], [CONTEXT, SLIDE], []),
        (["--loss_weights.target=0"], [CONTEXT, PART, CONTEXT], [CONTEXT, SLIDE, CONTEXT], []),
        (["--loss_weights={pull: 0, target: 0}"], [CONTEXT, PART], [], []),
        (["--loss_weights={pull: 0, target: 0, feature_distance: 0.1}"], [CONTEXT, PART], [], [CONTEXT]),
        (
            ["--loss_weights={source: 0, pull: 0, target: 0, feature_distance: 0.1}"],
            [CONTEXT],
            [],
            [CONTEXT],
        ),
        (["--loss_weights={pull: 0, target: 0, masked_consistency: 1}"], [CONTEXT, PART] * 2, [CONTEXT, SLIDE], []),
        (["--hrda.crops_at_once=20"], None, [CONTEXT, (20, 32, 32), (20, 32, 32), PART, CONTEXT], []),
        (["--translate.engine=none"], [CONTEXT, PART, CONTEXT, PART, CONTEXT], [CONTEXT, SLIDE, CONTEXT], []),
        (["--method=source_only"], [CONTEXT, PART], [], []),
    ],
)
def test_a_weight_of_zero_runs_no_forward_and_the_pull_runs_at_half_size(overrides, student, teacher, imagenet):
    cfg = hrda_config(*overrides)
    networks = tiny_networks(cfg)
    seen = [sizes_seen(network) for network in (networks.student.encoder, networks.teacher.encoder)]
    seen.append(sizes_seen(networks.imagenet) if networks.imagenet is not None else [])
    list(graphs(cfg, networks))
    assert [student or seen[0], teacher, imagenet] == seen


def test_the_terms_are_those_of_one_resolution():
    cfg = hrda_config("--loss_weights={feature_distance: 0.005, masked_consistency: 1}")
    expected = [["source", "feature_distance"], ["target"], ["masked_consistency"], ["pull"]]
    assert [list(graph.losses) for graph in graphs(cfg)] == expected


def test_a_labelled_target_crop_stands_in_its_own_style():
    cfg = hrda_config()
    batch = hrda_batch(cfg, from_target=torch.tensor([True, False]))
    made = pseudo_target(tiny_step(cfg, tiny_networks(cfg), batch))
    untranslated = batch.crop_inner(context_images(batch.outer_source), shrunk=2)
    assert torch.equal(made[0], untranslated[0])
    assert not torch.allclose(made[1], untranslated[1], atol=0.01)


def test_pseudo_labels_are_the_fused_ones_of_the_overlapping_slide():
    cfg = hrda_config()
    networks, batch = tiny_networks(cfg), hrda_batch(cfg)
    _, seen = together(graphs(cfg, networks, batch))
    teacher, images = networks.teacher, normalize(batch.target_images)

    def maps(pixels: Tensor) -> tuple[Tensor, ...]:
        return teacher.encoder(pixels, output_hidden_states=True).hidden_states

    context = maps(slow.halved(images))
    # All crops together: the teacher's batch norm uses the statistics of what it sees at once.
    boxes = slow.boxes_of_the_slide(*CROP, 32)
    crops = teacher.decode_head(maps(torch.cat([cut(images, box) for box in boxes]))).split(2)
    remaining = iter(crops)
    covered = slow.slid(lambda _: next(remaining), images, 32, 4, len(CLASSES))
    attention = teacher.scale_attention(context).sigmoid()
    expected = slow.fused(teacher.decode_head(context), covered, attention, None)
    torch.testing.assert_close(seen["teacher_logits"], expected, rtol=1e-4, atol=1e-5)
    assert seen["pseudo_labels"].shape == (2, *CROP)


# --------------------------------------------------------------------------------------------------- fused and detail


def test_the_loss_is_nine_parts_fused_and_one_part_detail():
    """Against the loop over pixels, with weights and ignored pixels, through bilinear upsampling of both."""
    torch.manual_seed(0)
    cfg, box = hrda_config(), (8, 16, 32, 32)
    output = T2SDAOutput(logits=torch.randn(1, 5, 16, 32), detail_logits=torch.randn(1, 5, 8, 8), detail_box=box)
    labels = torch.randint(0, 5, (1, *CROP))
    labels[:, 10:20, 20:40] = 255
    weights = torch.rand(1, *CROP)
    both = []
    for logits, inside in ((output.logits, (0, 0, *CROP)), (output.detail_logits, box)):
        size = (inside[2], inside[3])
        up = torch.stack([slow_segmentation.bilinear(one, size) for one in logits])
        both.append(slow_segmentation.cross_entropy(up, cut(labels, inside), cut(weights, inside)))
    value = fused_and_detail_loss(output, labels, cfg, weights)
    assert value.item() == pytest.approx(0.9 * both[0] + 0.1 * both[1], rel=1e-5)


@pytest.mark.parametrize(("weight", "shares"), [(0.0, (1, 0)), (1.0, (0, 1)), (0.25, (0.75, 0.25))])
def test_the_share_of_the_detail_is_a_choice(weight, shares):
    torch.manual_seed(0)
    output = T2SDAOutput(
        logits=torch.randn(2, 5, 16, 32), detail_logits=torch.randn(2, 5, 8, 8), detail_box=(0, 0, 32, 32)
    )
    labels = torch.randint(0, 5, (2, *CROP))
    both = segmentation_loss(output.logits, labels), segmentation_loss(output.detail_logits, labels[:, :32, :32])
    expected = shares[0] * both[0] + shares[1] * both[1]
    value = fused_and_detail_loss(output, labels, hrda_config(f"--hrda.detail_weight={weight}"))
    torch.testing.assert_close(value, expected)


def test_source_and_mixed_and_masked_losses_have_both_parts():
    cfg = hrda_config("--loss_weights.masked_consistency=1")
    networks, batch = tiny_networks(cfg), hrda_batch(cfg)
    outputs = outputs_of(networks.student)
    losses, seen = together(graphs(cfg, networks, batch))
    terms = {
        "source": (batch.source_labels, torch.ones(2, *CROP)),
        "target": (seen["mixed_labels"], seen["mixed_weights"]),
        "masked_consistency": (seen["pseudo_labels"], seen["pixel_weights"]),  # unmixed
    }
    for (name, (labels, weights)), (_, output) in zip(terms.items(), outputs, strict=False):
        fused = segmentation_loss(output.logits, labels, weights)
        own_labels, own_weights = cut(labels, output.detail_box), cut(weights, output.detail_box)
        assert own_labels.shape == (2, *DETAIL)
        detail = segmentation_loss(output.detail_logits, own_labels, own_weights)
        assert losses[name].item() == pytest.approx(0.9 * fused.item() + 0.1 * detail.item(), rel=1e-6)


def test_every_forward_draws_its_own_box():
    cfg = hrda_config("--loss_weights.masked_consistency=1")
    networks, batch = tiny_networks(cfg), hrda_batch(cfg)
    seen = outputs_of(networks.student)
    for seed in range(25):
        list(graphs(cfg, networks, batch, seed))
    boxes = [output.detail_box for _, output in seen]
    assert boxes[3::4] == [None] * 25  # the pull has no detail
    drawn = [box for box in boxes if box is not None]
    assert len(drawn) == 75
    assert {box[0] for box in drawn} == {0, 8, 16, 24}
    assert {box[1] for box in drawn} == set(range(0, 96, 8))
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert sum(a != b for a, b in zip(boxes[one::4], boxes[other::4], strict=True)) > 15


def test_source_only_has_both_parts_too():
    cfg = hrda_config("--method=source_only")
    networks, batch = tiny_networks(cfg), hrda_batch(cfg)
    seen = outputs_of(networks.student)
    value = next(graphs(cfg, networks, batch)).losses["source"]
    ((_, output),) = seen
    expected = 0.9 * segmentation_loss(output.logits, batch.source_labels) + 0.1 * segmentation_loss(
        output.detail_logits, cut(batch.source_labels, output.detail_box)
    )
    torch.testing.assert_close(value, expected)


# ------------------------------------------------------------------------------------------- the context's own terms


def test_feature_distance_is_that_of_the_context():
    cfg = hrda_config("--loss_weights.feature_distance=0.1", "--feature_distance.classes=[person, car]")
    networks, batch = tiny_networks(cfg), hrda_batch(cfg)
    labels = batch.source_labels.clone()
    labels[0, :, :64], labels[1, :, 64:] = 4, 3  # whole cells of 64 pixels, the coarsest stride at half size
    batch = replace(batch, source_labels=labels)
    context = slow.halved(normalize(batch.source_images))
    features = networks.student.encoder(context, output_hidden_states=True).hidden_states[-1].detach()
    frozen = networks.imagenet(context).last_hidden_state
    expected = slow_segmentation.feature_distance(features, frozen, labels, (3, 4), 0.75)
    assert features.shape[-2:] == (1, 2)
    found = next(graphs(cfg, networks, batch)).losses["feature_distance"]
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_translation_and_queries_are_at_half_size():
    """FDA on the halved windows, cut at half the corner: not a translation at full size, made smaller."""
    cfg = hrda_config(PLAIN)
    networks, batch = tiny_networks(cfg), hrda_batch(cfg)
    seen = outputs_of(networks.student)
    list(graphs(cfg, networks, batch))
    images, output = seen[-1]

    halved = [slow.halved(one).double().numpy() for one in (batch.outer_source, batch.style_reference)]
    for index, (top, left) in enumerate([(2, 3), (16, 32)]):
        reach = int(0.1 * 48)  # of the halved window's shorter side
        styled = torch.from_numpy(fda(halved[0][index], halved[1][index], reach, reach)[0]).float()
        expected = normalize(styled[None, :, top : top + 32, left : left + 64])[0]
        torch.testing.assert_close(images[index], expected, rtol=1e-4, atol=1e-4)
    assert output.embeddings.shape == (2, cfg.projector.dim, 8, 16)
    assert output.logits is None


def test_translation_at_full_size_is_a_choice():
    """Open point A23: the band of the full image; then the translation can be mixed and learned from, too."""
    cfg = hrda_config(PLAIN, "--translate.hrda_scale=full", "--mix.source=pseudo_target", "--uda.source_ce_on=ptarget")
    networks, batch = tiny_networks(cfg), hrda_batch(cfg)
    seen, sizes = outputs_of(networks.student), sizes_seen(networks.student.encoder)
    list(graphs(cfg, networks, batch))
    assert sizes == [CONTEXT, PART, CONTEXT, PART, CONTEXT]
    for index, (top, left) in enumerate([(4, 6), (32, 64)]):
        reach = int(0.1 * 96)
        windows = (batch.outer_source[index], batch.style_reference[index])
        styled = torch.from_numpy(fda(*(one.double().numpy() for one in windows), reach, reach)[0]).float()
        expected = normalize(styled[None, :, top : top + 64, left : left + 128])[0]
        for images, _ in (seen[0], seen[-1]):  # what the source loss sees, and what is pulled
            torch.testing.assert_close(images[index], expected, rtol=1e-4, atol=1e-4)
    assert seen[-1][1].embeddings.shape == (2, cfg.projector.dim, 8, 16)


def test_without_a_translation_the_queries_are_the_source_itself():
    cfg = hrda_config("--translate.engine=none")
    networks, batch = tiny_networks(cfg), hrda_batch(cfg)
    seen = outputs_of(networks.student)
    list(graphs(cfg, networks, batch))
    images, output = seen[-1]
    assert torch.equal(images, normalize(batch.source_images))
    assert output.embeddings.shape == (2, cfg.projector.dim, 8, 16)


def test_keys_are_the_contexts_and_labels_the_first_of_eight_by_eight_pixels():
    cfg = hrda_config()
    networks, batch = tiny_networks(cfg), hrda_batch(cfg)
    made = outputs_of(networks.teacher)
    _, seen = together(graphs(cfg, networks, batch))
    keys_t, keys_s = (output.embeddings for _, output in made)
    for keys, images in ((keys_s, batch.source_images), (keys_t, batch.target_images)):
        maps = networks.teacher.encoder(slow.halved(normalize(images)), output_hidden_states=True).hidden_states
        torch.testing.assert_close(keys, networks.teacher.projector(maps), rtol=1e-4, atol=1e-5)
    assert keys_s.shape == (2, cfg.projector.dim, 8, 16)
    y_s, y_t = (labels[:, ::8, ::8].flatten() for labels in (batch.source_labels, seen["pseudo_labels"]))
    for class_id, rows, from_source, from_target in zip(*vars(listed(seen["samples"])).values(), strict=True):
        assert (y_s[rows] == class_id).all()
        assert (y_s[from_source] != class_id).all()
        assert (y_s[from_source] != 255).all()
        assert (y_t[from_target] != class_id).all()


def test_the_pull_trains_encoder_and_projector_alone():
    cfg = hrda_config()
    networks = tiny_networks(cfg)
    for graph in graphs(cfg, networks):
        if "pull" in graph.losses:
            graph.losses["pull"].backward()
    reached = {
        name: any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
        for name, part in networks.student.named_children()
    }
    assert reached == {"segformer": True, "decode_head": False, "scale_attention": False, "projector": True}


# --------------------------------------------------------------------------------------------------- margins and data


def test_pixels_outside_of_the_margins_have_no_weight():
    valid = torch.ones(2, *CROP, dtype=torch.bool)
    valid[0, :, :10] = False
    cfg = hrda_config(
        "--loss_weights={masked_consistency: 1, pull: 0}", "--drw={apply_to: target, use_valid_mask: true}"
    )
    _, plain = together(graphs(cfg))
    losses, seen = together(graphs(cfg, batch=hrda_batch(cfg, target_valid=valid)))
    assert plain["pixel_weights"][0, 10, 3] > 0
    assert torch.equal(seen["pixel_weights"], plain["pixel_weights"] * valid)
    assert losses["masked_consistency"] > 0


class FakeDomain:
    """Two images whose pixels tell where they come from: (row, column, number)."""

    def __init__(self, height: int, width: int) -> None:
        self.rows, self.columns = np.mgrid[:height, :width].astype(np.uint8)

    def __len__(self) -> int:
        return 2

    def at(self, index: int) -> tuple["FakeDomain", int]:
        return self, index

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(2))

    def resized_image(self, index: int) -> np.ndarray:
        return np.stack([self.rows, self.columns, np.full_like(self.rows, index)], axis=-1)

    def validity(self, size: tuple[int, int]) -> None:
        """There is no mask."""

    def labels(self, index: int) -> np.ndarray:
        return (self.rows // 8 + self.columns // 8) % len(CLASSES)


def samples(cfg: RunConfig, num: int = 24) -> list[dict[str, np.ndarray]]:
    dataset = PairDataset(cfg, FakeDomain(101, 203), FakeDomain(101, 203), None)  # type: ignore[arg-type]
    return [dataset[position] for position in range(num)]


def test_source_crops_lie_on_even_pixels():
    """Otherwise the translation at half size would be half a pixel beside its labels."""
    for overrides, expected in ((HRDA, {0}), (HRDA[:1], {0, 1})):
        drawn = samples(tiny_config(*overrides, "--data.flip=false"))
        offsets = {int(side) % 2 for sample in drawn for side in sample["source_images"][0, 0, :2]}
        corners = {int(side) % 2 for sample in drawn for side in sample["inner_corner"]}
        assert offsets == corners == expected
    for sample in samples(hrda_config()):  # flipped ones too
        assert (sample["inner_corner"] % 2 == 0).all()
        top, left = sample["inner_corner"]
        window = sample["outer_source"][top : top + 64, left : left + 128]
        assert np.array_equal(window, sample["source_images"])


def test_side_margins_are_columns_of_the_image_wherever_the_crop_lies():
    cfg = hrda_config("--uda={ignore_left: 30, ignore_right: 40}")
    flips = Counter()
    for sample in samples(cfg):
        columns = sample["target_images"][..., 1].astype(int)
        flips[bool(columns[0, 0] > columns[0, 1])] += 1
        assert np.array_equal(sample["target_valid"], (columns >= 30) & (columns < 203 - 40))
    assert set(flips) == {True, False}
    batch = collate(samples(cfg)).on(torch.device("cpu"))
    assert batch.target_valid.dtype == torch.bool
    assert batch.target_valid.shape == (24, *CROP)
    assert "target_valid" not in samples(hrda_config(), 1)[0]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--hrda.crop_size=[36, 32]"], r"hrda\.crop_size must be multiples of 8, twice the stride"),
        (["--hrda.crop_size=[128, 128]"], r"hrda\.crop_size must be at most data\.crop_size \(64, 128\)"),
        (["--hrda.crop_size=[16, 32]"], r"hrda\.crop_size must be at least 32 in every place"),
        (["--data.crop_size=[96, 128]"], r"data\.crop_size must be multiples of 64 with hrda\.enabled"),
        (["--data.outer_crop_size=[97, 192]"], r"data\.outer_crop_size must be even with hrda\.enabled"),
        (["--mix.source=pseudo_target"], r"mix\.source must be 'source' with hrda\.enabled"),
        (["--hrda.detail_weight=1.5"], r"hrda\.detail_weight must be in \[0, 1\]"),
        (["--hrda.crops_at_once=0"], r"hrda\.crops_at_once must be at least 1"),
        (["--model={size: resnet101c, head: deeplabv2}", "--hrda.crop_size=[40, 64]"], "multiples of 16"),
        (["--uda.ignore_left=-1"], r"uda\.ignore_left must be at least 0"),
    ],
)
def test_a_config_that_cannot_mean_anything_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        hrda_config(*overrides)

"""Masked image consistency as a config of the objective (method 2.8)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import reference.segmentation as slow
import torch
from tiny import CROP, alone, tiny_batch, tiny_config, tiny_parts
from torch import Generator, Tensor, nn

from t2sda_hf.batch import UdaBatch, normalize
from t2sda_hf.config import RunConfig
from t2sda_hf.methods import Parts, t2sda
from t2sda_hf.methods.t2sda import t2sda_losses

MIC = [
    "--loss_weights.masked_consistency=1",
    "--patch_mask.block_size=16",
    "--model={head_dropout: 0, drop_path_rate: 0}",
]
ALONE = "--loss_weights={source: 0, target: 0, pull: 0}"
PLAIN = "--augment={jitter_probability: 0, blur_probability: 0}"


def losses(
    cfg: RunConfig, parts: Parts | None = None, batch: UdaBatch | None = None, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    torch.manual_seed(seed)
    yield from t2sda_losses(
        batch or tiny_batch(cfg), parts or tiny_parts(cfg), cfg, 0, Generator().manual_seed(seed), alone
    )


def inputs_of(network: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


def masked_inputs(*overrides: str, seeds: int = 1) -> list[Tensor]:
    """What the student sees of the target of `tiny_batch`, where the masked term is the only one."""
    cfg = tiny_config(*MIC, ALONE, *overrides)
    parts, batch = tiny_parts(cfg), tiny_batch(cfg)
    seen = inputs_of(parts.student)
    for seed in range(seeds):
        list(losses(cfg, parts, batch, seed))
    return seen


# ------------------------------------------------------------------------------------------------------- what is run


@pytest.mark.parametrize(
    ("weights", "student", "teacher"),
    [
        ("masked_consistency: 1", 4, 2),
        ("masked_consistency: 0", 3, 2),
        ("masked_consistency: 1, pull: 0", 3, 1),
        ("masked_consistency: 1, pull: 0, target: 0", 2, 1),
        ("masked_consistency: 1, pull: 0, target: 0, source: 0", 1, 1),
        ("masked_consistency: 0, pull: 0, target: 0", 1, 0),
    ],
)
def test_it_adds_one_student_forward_and_none_of_the_teacher(weights, student, teacher):
    cfg = tiny_config(f"--loss_weights={{{weights}}}")
    parts = tiny_parts(cfg)
    seen = inputs_of(parts.student.segformer), inputs_of(parts.teacher.segformer)
    list(losses(cfg, parts))
    assert (len(seen[0]), len(seen[1])) == (student, teacher)


def test_it_comes_after_the_mixed_image_and_before_the_pull():
    assert [list(terms) for terms in losses(tiny_config(*MIC))] == [
        ["source"],
        ["target", "trust"],
        ["masked_consistency"],
        ["pull"],
    ]


def test_without_it_nothing_is_drawn():
    """The other terms are those of a run that does not know it; with it they only see other random numbers."""
    without, with_mask = tiny_config(MIC[2]), tiny_config(*MIC)
    plain = {name: value.item() for terms in losses(without) for name, value in terms.items()}
    masked = {name: value.item() for terms in losses(with_mask) for name, value in terms.items()}
    assert plain["source"] == masked["source"]
    assert plain["target"] == masked["target"]
    assert plain["pull"] != masked["pull"]  # drawn after it


# ---------------------------------------------------------------------------------------------- the image and its loss


TARGET = normalize(tiny_batch(tiny_config()).target_images)


def squares(image: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Whether all, and whether any, pixels of each square are hidden, (B,rows,columns)."""
    cells = (image == 0).all(dim=1).unflatten(1, (-1, side)).unflatten(3, (-1, side))
    return cells.all(4).all(2), cells.any(4).any(2)


def test_the_student_sees_the_target_with_whole_squares_at_the_mean_colour():
    images = masked_inputs(PLAIN, seeds=40)
    for image in images:
        hidden = (image == 0).all(dim=1, keepdim=True).expand_as(image)
        assert torch.equal(image[~hidden], TARGET[~hidden])
        every, some = squares(image, 16)
        assert torch.equal(every, some)
        assert every.shape == (2, CROP[0] // 16, CROP[1] // 16)
    share = sum((image == 0).float().mean().item() for image in images) / len(images)
    assert share == pytest.approx(0.7, abs=0.06)  # 640 squares, deviation 0.018


def test_squares_and_share_are_keys():
    assert torch.equal(masked_inputs(PLAIN, "--patch_mask.ratio=0")[0], TARGET)
    assert masked_inputs(PLAIN, "--patch_mask.ratio=1")[0].abs().max() == 0
    (fine,) = masked_inputs(PLAIN, "--patch_mask.block_size=8")
    assert torch.equal(*squares(fine, 8))
    assert not torch.equal(*squares(fine, 16))


def test_it_is_coloured_anew_and_the_batch_is_not_changed():
    """Jitter and blur are drawn apart from those of the mixed image, and hidden squares stay exactly 0."""
    cfg = tiny_config(*MIC, "--augment={jitter_probability: 1, blur_probability: 0}", "--patch_mask.ratio=0.5")
    batch = tiny_batch(cfg)
    before = batch.target_images.clone()
    parts = tiny_parts(cfg)
    seen = inputs_of(parts.student)
    list(losses(cfg, parts, batch))
    assert torch.equal(batch.target_images, before)
    kept = (seen[2] != 0).any(dim=1, keepdim=True).expand_as(seen[2])
    target = normalize(before)
    assert 0.2 < kept.float().mean() < 0.8
    assert (seen[2][kept] - target[kept]).abs().mean() > 0.05
    # Where the mixed image shows the target it has other colours: its jitter was another draw.
    from_target = kept & ((seen[1] - target).abs() < 1.5)
    assert (seen[2][from_target] - seen[1][from_target]).abs().mean() > 0.05


@pytest.mark.parametrize("coin", ["jitter_probability", "blur_probability"])
def test_whether_it_is_coloured_is_its_own_coin(coin):
    cfg = tiny_config(
        *MIC,
        f"--augment={{jitter_probability: 0, blur_probability: 0, {coin}: 0.5}}",
        "--patch_mask.ratio=0",
        "--loss_weights={source: 0, pull: 0}",
    )
    parts, batch = tiny_parts(cfg), tiny_batch(cfg)
    seen = inputs_of(parts.student)
    source = normalize(batch.source_images)
    outcomes = set()
    for seed in range(20):
        list(losses(cfg, parts, batch, seed))
        mixed, masked = seen[-2:]
        outcomes.add((((mixed == TARGET) | (mixed == source)).all().item(), torch.equal(masked, TARGET)))
    assert outcomes == {(True, True), (True, False), (False, True), (False, False)}


def test_the_loss_is_that_of_the_teachers_labels_with_the_unmixed_trust():
    """Pixel by pixel: the same labels and weights as the host method, before the paste, rows left out included."""
    cfg = tiny_config(*MIC, PLAIN)
    parts, batch = tiny_parts(cfg), tiny_batch(cfg)
    seen = inputs_of(parts.student)
    values = {name: value.item() for terms in losses(cfg, parts, batch) for name, value in terms.items()}

    teacher_logits = parts.teacher(normalize(batch.target_images)).logits
    probabilities = torch.stack([slow.bilinear(one, CROP) for one in teacher_logits]).softmax(dim=1)
    confidence, pseudo_labels = probabilities.max(dim=1)
    trust = slow.pseudo_label_weights(confidence, 0.6, False, 2, 4)
    assert 0 < trust.max() < 1
    with torch.no_grad():
        logits = torch.stack([slow.bilinear(one, CROP) for one in parts.student(seen[2]).logits])
    expected = slow.cross_entropy(logits, pseudo_labels, trust)
    assert values["masked_consistency"] == pytest.approx(expected, rel=1e-4)


def test_reweighting_of_the_mixed_target_leaves_it_alone(monkeypatch):
    """Table 9's second row weighs the pasted images' target pixels; the masked image has the plain weights."""
    weights: list[Any] = []
    original = t2sda.segmentation_loss

    def record(logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None) -> Tensor:
        weights.append(pixel_weights)
        return original(logits, labels, pixel_weights)

    monkeypatch.setattr(t2sda, "segmentation_loss", record)
    for apply_to in ("none", "target"):
        list(losses(tiny_config(*MIC, f"--drw.apply_to={apply_to}")))
    assert torch.equal(weights[2], weights[5])
    assert not torch.equal(weights[1], weights[4])
    assert weights[2].unique().numel() == 2  # one trust for the batch, and the rows left out


def test_it_trains_encoder_and_head():
    cfg = tiny_config(*MIC)
    parts = tiny_parts(cfg)
    for terms in losses(cfg, parts):
        if "masked_consistency" in terms:
            terms["masked_consistency"].backward()
    reached = {
        name: any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
        for name, part in parts.student.named_children()
    }
    assert reached == {"segformer": True, "decode_head": True, "projector": False}


def test_the_source_does_not_matter_to_it():
    """What the masked image says does not depend on the source."""
    cfg = tiny_config(*MIC, PLAIN, "--loss_weights={source: 0, target: 0, pull: 0}")
    batch = tiny_batch(cfg)
    other = replace(batch, source_images=torch.rand_like(batch.source_images))
    assert [t["masked_consistency"].item() for t in losses(cfg, batch=batch)] == [
        t["masked_consistency"].item() for t in losses(cfg, batch=other)
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--patch_mask.block_size=0", r"patch_mask\.block_size must be at least 1"),
        ("--patch_mask.ratio=1.5", r"patch_mask\.ratio must be in \[0, 1\]"),
        ("--loss_weights.masked_consistency=-1", r"loss_weights\.masked_consistency must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(override)

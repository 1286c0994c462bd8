"""Masked image consistency as a config of the objective (method 2.8)."""

from dataclasses import replace

import pytest
import reference.segmentation as slow
import torch
from tiny import CROP, tiny_batch, tiny_config, tiny_graphs, tiny_networks, together
from torch import Tensor, nn

from t2sda_hf.batch import normalize

MIC = [
    "--loss_weights.masked_consistency=1",
    "--patch_mask.block_size=16",
    "--model={head_dropout: 0, drop_path_rate: 0}",
]
ALONE = "--loss_weights={source: 0, target: 0, pull: 0}"
PLAIN = "--augment={jitter_probability: 0, blur_probability: 0}"


def inputs_of(network: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


def masked_inputs(*overrides: str, seeds: int = 1) -> list[Tensor]:
    """What the student sees of the target of `tiny_batch`, where the masked term is the only one."""
    cfg = tiny_config(*MIC, ALONE, *overrides)
    networks, batch = tiny_networks(cfg), tiny_batch(cfg)
    seen = inputs_of(networks.student)
    for seed in range(seeds):
        list(tiny_graphs(cfg, networks, batch, seed=seed))
    return seen


# ------------------------------------------------------------------------------------------------------- what is run


def test_it_comes_after_the_mixed_image_and_before_the_pull():
    expected = [["source"], ["target"], ["masked_consistency"], ["pull"]]
    assert [list(graph.losses) for graph in tiny_graphs(tiny_config(*MIC))] == expected


def test_without_it_nothing_is_drawn():
    """The other terms are those of a run that does not know it."""
    without, with_mask = tiny_config(MIC[2]), tiny_config(*MIC)
    plain, masked = (together(tiny_graphs(cfg))[0] for cfg in (without, with_mask))
    assert set(masked) - set(plain) == {"masked_consistency"}
    assert all(masked[name] == value for name, value in plain.items())


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
    networks = tiny_networks(cfg)
    seen = inputs_of(networks.student)
    list(tiny_graphs(cfg, networks, batch))
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
        PLAIN,
        f"--augment.{coin}=0.5",
        "--patch_mask.ratio=0",
        "--loss_weights={source: 0, pull: 0}",
    )
    networks, batch = tiny_networks(cfg), tiny_batch(cfg)
    seen = inputs_of(networks.student)
    source = normalize(batch.source_images)
    outcomes = set()
    for seed in range(20):
        list(tiny_graphs(cfg, networks, batch, seed=seed))
        mixed, masked = seen[-2:]
        outcomes.add((((mixed == TARGET) | (mixed == source)).all().item(), torch.equal(masked, TARGET)))
    assert outcomes == {(True, True), (True, False), (False, True), (False, False)}


def test_the_loss_is_that_of_the_teachers_labels_with_the_unmixed_trust():
    """Pixel by pixel: the same labels and weights as the host method, before the paste, rows left out included."""
    cfg = tiny_config(*MIC, PLAIN)
    networks, batch = tiny_networks(cfg), tiny_batch(cfg)
    seen = inputs_of(networks.student)
    losses, _ = together(tiny_graphs(cfg, networks, batch))

    teacher_logits = networks.teacher(normalize(batch.target_images)).logits
    probabilities = torch.stack([slow.bilinear(one, CROP) for one in teacher_logits]).softmax(dim=1)
    confidence, pseudo_labels = probabilities.max(dim=1)
    trust = slow.pseudo_label_weights(confidence, 0.6, False, 2, 4)
    assert 0 < trust.max() < 1
    with torch.no_grad():
        logits = torch.stack([slow.bilinear(one, CROP) for one in networks.student(seen[2]).logits])
    expected = slow.cross_entropy(logits, pseudo_labels, trust)
    assert losses["masked_consistency"].item() == pytest.approx(expected, rel=1e-4)


def test_reweighting_of_the_mixed_target_leaves_it_alone():
    """Table 9's second row weighs the pasted images' target pixels; the masked image has the plain weights."""
    plain, weighed = (together(tiny_graphs(tiny_config(*MIC, f"--drw.apply_to={to}"))) for to in ("none", "target"))
    assert plain[0]["masked_consistency"] == weighed[0]["masked_consistency"]
    assert torch.equal(plain[1]["pixel_weights"], weighed[1]["pixel_weights"])
    assert not torch.equal(plain[1]["mixed_weights"], weighed[1]["mixed_weights"])
    assert plain[1]["pixel_weights"].unique().numel() == 2  # one trust for the batch, and the rows left out


def test_it_trains_encoder_and_head():
    cfg = tiny_config(*MIC)
    networks = tiny_networks(cfg)
    for graph in tiny_graphs(cfg, networks):
        if "masked_consistency" in graph.losses:
            graph.losses["masked_consistency"].backward()
    reached = {
        name: any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
        for name, part in networks.student.named_children()
    }
    assert reached == {"segformer": True, "decode_head": True, "projector": False}


def test_the_source_does_not_matter_to_it():
    """What the masked image says does not depend on the source."""
    cfg = tiny_config(*MIC, PLAIN, "--loss_weights={source: 0, target: 0, pull: 0}")
    batch = tiny_batch(cfg)
    other = replace(batch, source_images=torch.rand_like(batch.source_images))
    ((one, _), (another, _)) = (together(tiny_graphs(cfg, batch=given)) for given in (batch, other))
    assert one["masked_consistency"] == another["masked_consistency"]


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

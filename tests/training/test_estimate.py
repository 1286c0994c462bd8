"""The estimate: operations against closed forms, passes and memory against the same update made for real."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from encoders import automatic, write_encoder
from tiny import TINY, alone, tiny_config, tiny_networks
from torch import nn

from t2sda_hf.cli import main
from t2sda_hf.commands import estimate
from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.methods import METHODS, ClassMemory, Networks, Step, make_networks
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation
from t2sda_hf.training.build import build_student
from t2sda_hf.training.checkpoint import allocate_state
from t2sda_hf.training.estimate import (
    Cost,
    Counting,
    Device,
    count_update,
    least_memory,
    random_batch,
    refuse_too_large,
)
from t2sda_hf.training.loop import backward
from t2sda_hf.training.optim import make_optimizer
from t2sda_hf.training.seeding import seed_step
from t2sda_hf.translate import build_engine

HRDA = ["--data={crop_size: [64, 128], outer_crop_size: [64, 128]}", "--hrda={enabled: true, crop_size: [32, 64]}"]
GENERAL = ["--method=generalization", "--translate.engine=gaussian_blur", "--drw.apply_to=none"]
# Overrides, and images that pass (student, teacher) encoder, head and projector in batches of 2, by hand.
RUNS = {
    "t2sda": ([], (6, 4), (4, 2), (2, 4)),  # source, mixed, pseudo-target; both domains
    "dacs": (["--loss_weights.pull=0"], (4, 2), (4, 2), (0, 0)),
    "mic": (["--loss_weights.masked_consistency=1"], (8, 4), (6, 2), (2, 4)),
    "no target": (["--loss_weights={target: 0, feature_distance: 0.005}"], (4, 4), (2, 2), (2, 4)),
    # A context and a detail of everything labelled; of the target the teacher's nine details.
    "hrda": (HRDA, (10, 22), (8, 20), (2, 4)),
    "joint": (["--pull.teacher_forward=joint"], (6, 4), (4, 4), (2, 4)),  # the source gets needless logits
    "generalization": (GENERAL, (4, 2), (2, 0), (2, 2)),
    "source only": (["--method=source_only"], (2, 0), (2, 0), (0, 0)),
}


def made_for_real(cfg: RunConfig, build: Callable[[RunConfig], Networks] = tiny_networks) -> Cost:
    """What `count_update` estimates, of real networks under the same counting."""
    cost = Cost()
    with Counting(cost):
        networks = build(cfg)
        if cfg.model.activation_checkpointing:
            networks.student.activation_checkpointing_enable()
        optimizer = make_optimizer(networks.student.pretrained_encoder, networks.student, cfg.optim)
        allocate_state(optimizer)
        cost.lasting = cost.peak = cost.live
        for micro in range(cfg.train.micro_batches):
            generators = seed_step(cfg.seed, cfg.full_from, micro, torch.device("cpu"))
            batch = random_batch(cfg).on(torch.device("cpu"))
            memory = ClassMemory(len(cfg.classes), cfg.projector.dim)
            step = Step(batch, networks, cfg, memory, *generators, alone, cfg.full_from)
            for graph in METHODS[cfg.method](step):
                backward(graph.losses, cfg.loss_weights, networks.student.parameters())
    return cost


def flops_of(function: object) -> float:
    cost = Cost()
    with Counting(cost):
        function()  # type: ignore[operator]
    return sum(cost.flops)


def test_a_linear_layer_costs_two_per_multiply_add_and_its_backward_twice_that() -> None:
    layer, rows = nn.Linear(3, 5), torch.rand(7, 3, requires_grad=True)
    assert flops_of(lambda: layer(rows)) == 2 * 7 * 3 * 5
    assert flops_of(lambda: layer(rows).sum().backward()) == 3 * 2 * 7 * 3 * 5
    assert flops_of(lambda: layer(rows.detach()).sum().backward()) == 2 * 2 * 7 * 3 * 5  # no gradient of the input


def test_groups_divide_the_cost_of_a_convolution_forward_and_backward() -> None:
    """torch's own counter forgets them in the backward."""
    images = torch.rand(2, 8, 6, 10, requires_grad=True)
    for groups in (1, 2, 8):
        layer = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        assert flops_of(lambda layer=layer: layer(images).sum().backward()) == 3 * 2 * (2 * 8 * 6 * 10) * 9 * 8 / groups


def test_attention_is_two_products_of_queries_and_keys() -> None:
    """torch's own counter does not see the fused kernel of the CPU."""
    query, key = torch.rand(2, 3, 50, 8, requires_grad=True), torch.rand(2, 3, 20, 8)
    expected = 2 * 2 * (2 * 3) * 50 * 20 * 8
    assert flops_of(lambda: F.scaled_dot_product_attention(query, key, key)) == expected
    assert flops_of(lambda: F.scaled_dot_product_attention(query, key, key).sum().backward()) == 3 * expected


def test_views_cost_nothing_and_are_no_memory() -> None:
    cost, values = Cost(), torch.rand(4, 5)
    with Counting(cost):
        cost.hold(values)
        half = values[:2].t().unsqueeze(0)
        assert (len(cost.flops), cost.live) == (0, 4 * 5 * 4)
        total = half + 1
        assert (len(cost.flops), cost.live) == (1, 4 * 5 * 4 + 2 * 5 * 4)
        assert cost.bytes == [2 * (2 * 5 * 4)]
        del total
        assert (cost.live, cost.peak) == (80, 120)


def test_the_forward_of_mit_b0_is_its_closed_form() -> None:
    """Per stage of N places and C channels with reduction r: embedding; queries and output 2·2NC²; keys and values of
    N/r² places, and the convolution before them; scores and their product 4·N·(N/r²)·C; MLP 2·2·N·C·4C and its 3x3.
    """
    config = T2SDAConfig.from_size("mit_b0")
    expected, before, side, images = 0.0, 3, 128, 2
    for channels, depth, reduction, kernel, stride in zip(
        config.hidden_sizes, config.depths, config.sr_ratios, config.patch_sizes, config.strides, strict=True
    ):
        side //= stride
        places, kept = side * side, side * side / reduction**2
        expected += 2 * places * kernel**2 * before * channels
        block = 2 * 2 * places * channels**2 + 2 * 2 * kept * channels**2 + 4 * places * kept * channels
        block += 2 * kept * reduction**2 * channels**2 if reduction > 1 else 0
        block += 2 * 2 * places * channels * 4 * channels + 2 * places * 4 * channels * 9
        expected += depth * block
        before = channels
    with torch.no_grad():
        encoder = T2SDAForSemanticSegmentation(config).encoder
        found = flops_of(lambda: encoder(torch.rand(images, 3, 128, 128)))
    assert found == pytest.approx(images * expected)
    assert found == pytest.approx(0.557e9, rel=0.01)  # what others count


@pytest.mark.parametrize("name", RUNS)
def test_passes_are_those_by_hand_and_memory_is_that_of_a_real_update(name: str) -> None:
    overrides, *numbers = RUNS[name]
    cfg = tiny_config(*overrides)
    expected = Counter()
    for part, (student, teacher) in zip(("encoder", "head", "projector"), numbers, strict=True):
        expected += Counter({f"student {part}": student, f"teacher {part}": teacher})
    if cfg.loss_weights.feature_distance:
        expected["imagenet encoder"] = 2
    found = count_update(cfg)
    passes = Counter({part: number for part, number in found.passes.items() if "scale_attention" not in part})
    assert passes == expected

    real = made_for_real(cfg)
    assert found.lasting == pytest.approx(real.lasting, rel=0.01)
    assert found.peak == pytest.approx(real.peak, rel=0.02)


def test_checkpointed_activations_cost_operations_and_save_memory() -> None:
    sizes = ("--data={crop_size: [96, 96], outer_crop_size: [96, 96]}", "--method=source_only")
    plain, saving = (
        (count_update(cfg), made_for_real(cfg))
        for cfg in (tiny_config(*sizes, f"--model.activation_checkpointing={on}") for on in ("false", "true"))
    )
    assert saving[0].passes == plain[0].passes
    for without, with_it in zip(plain, saving, strict=True):
        assert sum(with_it.flops) > 1.1 * sum(without.flops)
        assert with_it.peak < 0.85 * without.peak
    assert saving[0].peak == pytest.approx(saving[1].peak, rel=0.05)


@pytest.mark.parametrize(
    ("family", "how"), [("dinov2", "lora"), ("dinov3_vit", "full"), ("swin", "frozen"), ("convnext", "full")]
)
def test_another_encoder_whole_frozen_or_with_adapters(family: str, how: str, tmp_path: Path) -> None:
    """And twice in one process, though transformers keeps the positions of DINOv3 for the next network."""
    sizes = "--data={crop_size: [96, 96], outer_crop_size: [96, 96]}"
    cfg = automatic(write_encoder(family, tmp_path), f"--train.encoder={how}", sizes)
    found, again = count_update(cfg), count_update(cfg)
    student = build_student(cfg).train()  # outside of the counting: its levels are found by a forward
    real = made_for_real(cfg, lambda cfg: make_networks(cfg, deepcopy(student), build_engine(cfg.translate)))
    assert sum(found.flops) == sum(again.flops) == pytest.approx(sum(real.flops), rel=0.01)
    assert found.passes == again.passes
    trained, frozen = (
        sum(p.numel() for p in student.parameters() if p.requires_grad is learns) for learns in (True, False)
    )
    # Student, teacher and two moments of what is trained; of all else one tensor for both networks.
    assert found.lasting == pytest.approx(4 * (4 * trained + frozen), rel=0.05)  # and buffers
    assert found.peak == pytest.approx(real.peak, rel=0.12)  # the student that is copied is on the real account


def test_micro_batches_cost_time_and_no_memory_but_gradients() -> None:
    given = (tiny_config("--method=source_only", f"--train.micro_batches={number}") for number in (1, 3))
    one, three = map(count_update, given)
    assert sum(three.flops) == pytest.approx(3 * sum(one.flops), rel=0.02)
    gradients = one.lasting / 4  # of the micro-batches before; what lasts is two networks and two moments
    assert one.peak <= three.peak <= one.peak + gradients


def test_half_precision_halves_what_is_kept_between_forward_and_backward() -> None:
    given = (tiny_config("--method=source_only", f"--train.precision={name}") for name in ("tf32", "bf16"))
    full, half = map(count_update, given)
    assert not any(full.halves)
    assert any(half.halves)
    assert half.peak < full.peak
    assert sum(half.flops) == pytest.approx(sum(full.flops), rel=0.02)


def test_the_roofline_is_the_longer_of_products_and_traffic() -> None:
    device = Device("toy", float32=1e3, tf32=1e4, bf16=1e5, bandwidth=1e2, memory=0)
    cost = Cost(flops=[2e4, 0.0, 2e4], bytes=[100.0, 300.0, 10.0], halves=[False, False, True])
    assert cost.seconds(device, "tf32") == pytest.approx(2 + 3 + 0.2)
    assert cost.seconds(device, "float32") == pytest.approx(20 + 3 + 0.2)
    slow = replace(device, launch=2.0)
    assert (cost.seconds(slow, "tf32"), cost.seconds(slow, "float32")) == (6, pytest.approx(20 + 3 + 0.2))
    cost.fused = True
    assert cost.seconds(slow, "tf32") == pytest.approx(2 + 3 + 0.2)


def test_the_command_prints_every_method_and_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "this_machine", lambda: Device("toy", 1e9, 1e9, 1e9, 1e9, 1e9))
    assert main(["estimate", *TINY, "--baseline", "source_only", "--train.max_steps", "7", "--measure", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line[:1].strip()] == ["source_only", "t2sda"]
    assert sum("A100" in line and "fits" in line for line in lines) == 4
    assert sum("measured here:" in line for line in lines) == 1
    assert all(("launches" in line) == ("toy" not in line) for line in lines if "fits" in line)  # of a tiny network


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "config file 'nowhere.yaml' does not exist"),
        (["--optim.lr", "-1"], "optim.lr must be positive"),
        (["--measure", "1"], "--measure needs a whole number from 2, got 1"),
        ([], "there is nothing to estimate"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["estimate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--pull.num_queries=1000000000", "pull.num_queries and pull.num_negatives"),
        ("--train.batch_size=100000000", "train.batch_size and data.crop_size"),
        ("--model={depths: [256, 256, 256, 256], hidden_sizes: [4096, 4096, 4000, 4096]}", "model.depths"),
    ],
)
def test_what_no_machine_holds_is_refused_before_it_is_built(override: str, named: str) -> None:
    cfg = load_config("demo", [override])
    with pytest.raises(ValueError, match=rf"needs at least [\d,]+ GB of memory, and .* has .* decided by {named}"):
        refuse_too_large(cfg, torch.device("cpu"))


def test_the_least_memory_is_below_what_is_counted() -> None:
    cfg = load_config("demo", ["--data.crop_size=[64, 64]", "--data.outer_crop_size=[64, 64]"])
    assert 0 < sum(least_memory(cfg).values()) < count_update(cfg).peak

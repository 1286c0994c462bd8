"""train.precision and train.compile: what is computed how, and that files and results stay what they were."""

import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from encoders import automatic, write_encoder
from faults.arena import RUN, outcome
from running import undrawn
from tiny import tiny_batch, tiny_config, tiny_graphs, tiny_model, tiny_networks
from torch import Generator, Tensor

from t2sda_hf.cli import main
from t2sda_hf.config import RunConfig, dump_config
from t2sda_hf.device import choose_algorithms
from t2sda_hf.methods import METHODS, Networks
from t2sda_hf.methods.t2sda import draw_box
from t2sda_hf.training import distributed, loop
from t2sda_hf.training.build import accelerator_of, build_student, compile_networks
from t2sda_hf.training.checkpoint import Progress
from t2sda_hf.training.estimate import random_batch, stand_in_engine
from t2sda_hf.training.loop import Run, backward, update
from t2sda_hf.training.parts import half_weights, make_parts
from t2sda_hf.training.tracking import Tracker

# dynamo looks at .grad of whatever it captures.
from_tracing = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps one state per process, torch its flags: both are put back."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@pytest.mark.parametrize(
    ("precision", "tf32", "autocast"), [("tf32", True, "no"), ("float32", False, "no"), ("bf16", True, "bf16")]
)
def test_the_flags_are_those_of_the_config(fresh: None, precision: str, tf32: bool, autocast: str) -> None:
    accelerator, cfg = accelerator_of(tiny_config(f"--train.precision={precision}", "--train.log_with=[]"))
    assert (accelerator.mixed_precision, cfg.train.precision) == (autocast, precision)
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32


def test_every_command_has_its_accelerator_from_one_function() -> None:
    """So training, evaluate and predict round alike; what they do with it is tested where they are."""
    package = Path(__file__).parents[2] / "t2sda_hf"
    makers = [path.name for path in package.rglob("*.py") if re.search(r"\bAccelerator\(", path.read_text("utf-8"))]
    assert makers == ["device.py"]


def test_a_run_may_ask_for_algorithms_that_repeat(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    try:
        for asked in (True, False):
            accelerator_of(tiny_config(f"--train={{deterministic: {asked}, log_with: []}}"))
            assert torch.are_deterministic_algorithms_enabled() == asked
            assert torch.backends.cudnn.benchmark != asked
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = before
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]


@pytest.mark.parametrize("gpu", [True, False])
def test_attention_on_a_gpu_repeats_without_its_fused_kernels(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    """On an H100 torch warned that their backward does not. The same switches are a CPU's, whose kernel repeats."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda asked, warn_only: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    kernels = torch.backends.cuda
    try:
        for asked in (True, False):
            choose_algorithms(asked)
            fused = kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.cudnn_sdp_enabled()
            assert fused == ((not asked,) * 3 if gpu else (True,) * 3)
            assert kernels.math_sdp_enabled()
    finally:
        choose_algorithms(False)


def test_a_launch_with_bf16_is_written_down_as_bf16(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    _, cfg = accelerator_of(tiny_config("--train.log_with=[]"))
    assert "precision: bf16" in dump_config(cfg)


def three_steps(
    cfg: RunConfig, networks: Networks, after: Callable[[], object] = lambda: None
) -> list[dict[str, Tensor]]:
    """Losses of three updates that change nothing but the running statistics of batch norm; `after` follows each."""
    seen = []
    for step in range(3):
        for graph in tiny_graphs(cfg, networks, index=step, seed=step):
            backward(graph.losses, cfg.loss_weights, networks.student.parameters())
            assert all(graph.seen[name].dtype == torch.float32 for name in ("teacher_logits",) if name in graph.seen)
            seen.append(graph.logged)
        after()
    return seen


def test_bf16_is_inside_the_networks_alone(fresh: None) -> None:
    cfg = tiny_config("--train={precision: bf16, log_with: []}", "--loss_weights.masked_consistency=1")
    expected = three_steps(cfg, tiny_networks(cfg))
    accelerator, cfg = accelerator_of(cfg)
    networks = tiny_networks(cfg)
    inside: set[torch.dtype] = set()
    for network in (networks.student, networks.teacher):
        network.decode_head.classifier.register_forward_hook(lambda module, given, made: inside.add(made.dtype))
        accelerator.prepare_model(network, evaluation_mode=True)

    found = three_steps(cfg, networks)

    assert inside == {torch.bfloat16}
    assert {value.dtype for terms in found for value in terms.values()} == {torch.float32}
    assert {p.dtype for p in networks.student.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in networks.student.parameters() if p.grad is not None} == {torch.float32}
    for terms, others in zip(found, expected, strict=True):
        for name, value in terms.items():
            assert math.isfinite(value)
            if (
                name != "trust"
            ):  # a share of pixels above a threshold may jump, and the pull draws among pixels below one
                assert value.item() == pytest.approx(others[name].item(), rel=0.1 if name == "pull" else 0.05)


@pytest.mark.parametrize(("size", "checkpointed"), [("mit_b0", False), ("mit_b0", True), ("resnet101", False)])
def test_weights_that_are_cast_once_give_the_losses_and_gradients_of_autocast(
    fresh: None, size: str, checkpointed: bool
) -> None:
    """Bit by bit for a ResNet. Some layers of a Mix Transformer are nearer to float32 than autocast's."""
    head = ("--model={head: deeplabv2, hidden_sizes: [16, 16, 24, 32]}", "--projector.in_index=[3]")
    own = () if size == "mit_b0" else (f"--model.size={size}", *head)
    weights = "--loss_weights={feature_distance: 0.005, masked_consistency: 1}"
    words = ("--train={precision: bf16, log_with: []}", weights)
    twice = f"--model={{drop_path_rate: 0.5, activation_checkpointing: {str(checkpointed).lower()}}}"
    accelerator, cfg = accelerator_of(tiny_config(*words, *own, twice))

    def learned(cast_once: bool, halved: bool = True) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        networks = tiny_networks(cfg)
        if halved:
            networks.each(lambda _, network: accelerator.prepare_model(network, evaluation_mode=True))
        weights = dict(networks.student.named_parameters())
        halves, seen = half_weights(cfg, networks) if cast_once else None, []
        with nullcontext() if halves is None else halves.in_place():
            for graph in tiny_graphs(cfg, networks):
                backward(graph.losses, cfg.loss_weights, networks.student.parameters())
                seen.append(graph.logged)
                if halves is not None:
                    halves.hand_over()
        assert dict(networks.student.named_parameters()) == weights  # the same objects
        return seen, {name: p.grad for name, p in weights.items() if p.grad is not None}

    (expected, gradients), (found, others) = learned(False), learned(True)
    assert others.keys() == gradients.keys()
    assert {gradient.dtype for gradient in others.values()} == {torch.float32}
    if size == "mit_b0":
        _, exact = learned(False, halved=False)
        wrong, less_wrong = (
            sum((own[name] - gradient).square().sum().item() for name, gradient in exact.items())
            for own in (gradients, others)
        )
        assert less_wrong < wrong
        return
    assert found == expected
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=0.02 * gradient.abs().max().item(), msg=name)


def test_checkpointed_activations_change_no_loss() -> None:
    """Over whole steps, with drop path and dropout on, and every forward that the objective has."""
    words = ("--loss_weights.masked_consistency=1", "--model.drop_path_rate=0.5")
    cfg, twice = tiny_config(*words), tiny_config(*words, "--model.activation_checkpointing=true")
    expected = three_steps(cfg, tiny_networks(cfg))
    for terms, others in zip(three_steps(twice, tiny_networks(twice)), expected, strict=True):
        assert {name: value.item() for name, value in terms.items()} == {n: v.item() for n, v in others.items()}


HRDA = ("--data={crop_size: [64, 128], outer_crop_size: [96, 160]}", "--hrda={enabled: true, crop_size: [32, 64]}")


@from_tracing
@pytest.mark.parametrize(
    "words",
    [
        (),
        (*HRDA, "--loss_weights.masked_consistency=1", "--patch_mask.block_size=16"),
        ("--method=generalization", "--translate.engine=gaussian_blur", "--drw.apply_to=none"),
    ],
    ids=["daformer", "hrda and mic", "generalization"],
)
def test_compiled_pieces_give_the_same_losses_and_are_compiled_once(words: tuple[str, ...]) -> None:
    """With two resolutions the detail lies elsewhere in every step, which must not start another compilation."""
    cfg = tiny_config(*words)
    expected = three_steps(cfg, tiny_networks(cfg))
    networks = tiny_networks(cfg)
    compiled = [0]

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        compiled[0] += 1
        return graph.forward

    compile_networks([networks.student, networks.teacher], counting)
    torch.compiler.reset()
    so_far: list[int] = []
    found = three_steps(cfg, networks, lambda: so_far.append(compiled[0]))

    assert so_far[0] > 0
    assert len(set(so_far)) == 1
    for terms, others in zip(found, expected, strict=True):
        assert {name: value.item() for name, value in terms.items()} == {n: v.item() for n, v in others.items()}
    if cfg.hrda.enabled:
        boxes = {draw_box(cfg, tiny_batch(cfg).source_labels, Generator().manual_seed(step)) for step in range(3)}
        assert len(boxes) > 1, "or this test shows nothing"


def test_cuda_graphs_are_a_mode_of_inductor_and_need_a_gpu(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append(how))
    compile_networks([tiny_model()], "cuda_graphs")
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}] * 3
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    words = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *words, "--train.compile", "cuda_graphs"]) == 2
    assert "train.compile cuda_graphs needs a GPU, and this run is on a cpu" in capsys.readouterr().err


def test_hosts_meet_before_they_wait_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that died shows in what they say to each other. Here no device ever answers: "meta" has no values."""

    def lost(*_: object) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1] in /gloo/transport")

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    monkeypatch.setattr(distributed, "largest", lost)
    several: Any = SimpleNamespace(num_processes=2)
    with pytest.raises(RuntimeError) as raised:
        distributed.all_finite([torch.zeros((), device="meta")], several)
    assert distributed.lost_contact(raised.value)


@from_tracing
def test_a_compiled_run_that_was_resumed_leaves_the_files_of_a_plain_one(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backend "eager" captures graphs and runs them as written, so all must be equal bit by bit."""
    undrawn(monkeypatch)
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")

    def run(name: str, *arguments: str) -> int:
        steps = ("--train.max_steps", "4", "--train.save_every", "2", "--train.evaluate_every", "3")
        return main(
            ["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / name), *steps, *arguments]
        )

    update, made = loop.update, [0]

    def stopped_after_two(*arguments: Any) -> object:
        seen = update(*arguments)
        made[0] += 1
        if made[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return seen

    assert run("plain") == 0
    monkeypatch.setattr(loop, "update", stopped_after_two)
    assert run("compiled", "--train.compile", "eager") == 143
    assert "torch.compile (eager) took about" in capsys.readouterr().out
    assert run("compiled", "--resume", "auto") == 2
    assert "train.compile: 'eager' before, 'none' now" in capsys.readouterr().err
    assert run("compiled", "--resume", "auto", "--train.compile", "eager") == 0
    assert outcome(tmp_path / "compiled") == outcome(tmp_path / "plain")


def test_compiling_everything_by_the_launch_is_refused(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "set train.compile instead" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["full", "lora"])
def test_another_encoder_learns_in_bf16(fresh: None, how: str, tmp_path: Path) -> None:
    """Whole and with adapters: its weights stay float32, and what it makes of images stays finite."""
    folder = write_encoder("dinov2", tmp_path / "encoder")
    cfg = automatic(folder, f"--train.encoder={how}", "--train={precision: bf16, log_with: []}")
    accelerator, cfg = accelerator_of(cfg)
    parts = make_parts(cfg, build_student(cfg).train(), stand_in_engine(cfg), accelerator)
    run = Run(cfg, accelerator, parts, METHODS[cfg.method], repeat(random_batch(cfg)))
    with Tracker(accelerator, tmp_path, 2, Progress(), cfg.method, show=False) as tracker:
        for step in range(2):
            update(run, step, tracker)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in parts.networks.student.parameters())
    learns = [id(parameter) for parameter in parts.networks.student.parameters() if parameter.requires_grad]
    assert [id(parameter) for parameter in parts.trained] == learns  # not copies, so that the norm is of all gradients


def test_a_run_that_compares_weights_has_no_copies_of_them() -> None:
    anchored: Any = SimpleNamespace(loss_weights=SimpleNamespace(anchor=0.1))
    assert half_weights(anchored, tiny_networks(tiny_config())) is None


def test_an_update_walks_through_no_network(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds parameters and buffers at the first one, and keeps them."""
    accelerator, cfg = accelerator_of(tiny_config("--train.log_with=[]"))
    parts = make_parts(cfg, tiny_model(), stand_in_engine(cfg), accelerator)
    run = Run(cfg, accelerator, parts, METHODS[cfg.method], repeat(tiny_batch(cfg)))

    def walked(*_: object, **__: object) -> None:
        raise AssertionError("walked")

    with Tracker(accelerator, tmp_path, 2, Progress(), cfg.method, show=False) as tracker:
        update(run, 0, tracker)
        for name in ("parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules"):
            for network in (parts.networks.student, parts.networks.teacher):
                monkeypatch.setattr(network, name, walked, raising=False)
        update(run, 1, tracker)

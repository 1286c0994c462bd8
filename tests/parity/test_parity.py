"""The public code of DAFormer, HRDA and MIC computed these numbers; ours must give the same (README.md beside this)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.recipe import HERE, checkpoint, image, labels, sample, uniform
from safetensors.torch import load_file
from tiny import alone
from torch import Generator, Tensor

from t2sda_hf.augment.color import blur_kernel_size, change_colors, draw_jitter, gaussian_blur
from t2sda_hf.batch import UdaBatch, normalize
from t2sda_hf.cli import main
from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.data.rare_class_sampling import rare_classes
from t2sda_hf.evaluation.inference import predict_logits
from t2sda_hf.hub.convert import convert, pick_network
from t2sda_hf.labels import THING_CLASSES
from t2sda_hf.losses.feature_distance import downscale_labels_by_share
from t2sda_hf.methods import ClassMemory, Networks, Step, t2sda
from t2sda_hf.models import T2SDAForSemanticSegmentation
from t2sda_hf.teacher import ema_momentum, make_teacher, update_teacher
from t2sda_hf.training.derive import without_data
from t2sda_hf.training.loop import backward
from t2sda_hf.training.optim import make_optimizer
from t2sda_hf.translate import build_engine

THEIRS = {name: load_file(HERE / f"{name}.safetensors") for name in ("daformer", "hrda", "mic")}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    difference = (ours.detach().double() - theirs.double()).abs().max()
    assert ours.shape == theirs.shape
    assert difference <= tolerance, f"differs by {difference:.2e}, the largest is {theirs.abs().max():.2e}"


# ----------------------------------------------------------------------------------------------- converted networks


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., T2SDAForSemanticSegmentation]:
    """A network of theirs, on the way a user takes: a .pth file, `t2sda convert`, `from_pretrained`."""

    def convert(case: str, **config: object) -> T2SDAForSemanticSegmentation:
        torch.save({"state_dict": checkpoint(case)}, tmp_path / "their.pth")
        assert main(["convert", str(tmp_path / "their.pth"), str(tmp_path / case)]) == 0
        return T2SDAForSemanticSegmentation.from_pretrained(tmp_path / case, **config)

    return convert


@pytest.mark.parametrize(
    ("case", "size", "window", "stride"),
    [
        ("mit_daformer", (64, 96), (48, 64), (32, 48)),
        ("mit_segformer", (64, 96), (48, 64), (32, 48)),
        ("mit_conv", (70, 91), (64, 64), (32, 48)),
        ("resnet_dlv2", (64, 96), (48, 64), (32, 48)),
        ("hrda_daformer", (128, 192), (128, 128), (64, 64)),
        ("hrda_dlv2", (128, 192), (128, 128), (64, 64)),
    ],
)
def test_encoder_heads_and_inference(converted, case, size, window, stride):
    theirs = {k.removeprefix(f"{case}/"): v for file in THEIRS.values() for k, v in file.items() if k.startswith(case)}
    model = converted(case, detail_crop_size=(64, 64))
    pixels = normalize(image(case, (2, 3, *size)))
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    if not model.config.multi_resolution:
        for level, features in enumerate(output.hidden_states):
            close(sample(features), theirs[f"features.{level}"])
        close(sample(output.logits), theirs["logits"])
    close(sample(predict_logits(model, pixels)), theirs["whole"])
    close(sample(predict_logits(model, pixels, "slide", window, stride)), theirs["slide"])


def test_the_eps_of_the_norms_is_what_makes_them_equal(converted):
    model = converted("mit_daformer", encoder_ln_eps_fix=False)
    with torch.no_grad():
        features = model(normalize(image("mit_daformer", (2, 3, 64, 96))), output_hidden_states=True).hidden_states
    assert (sample(features[0]) - THEIRS["daformer"]["mit_daformer/features.0"]).abs().max() > 1e-5


# --------------------------------------------------------------------------------------------- losses and whole steps


def jittered(images: Tensor, order: Tensor, factors: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Our colour jitter with their draws: the order of the four steps, and (4,B) factors."""
    shares = (factors - 0.8) / 0.4  # of the interval that each is drawn from
    shares[3] = (factors[3] + 0.2) / 0.4  # hue is drawn around 0, the others around 1
    drawn = iter(shares)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: next(drawn))
        patch.setattr(torch, "randperm", lambda *_, **__: order)
        return change_colors(images, draw_jitter(len(images), 0.2, Generator()))


def blurred(images: Tensor, sigmas: Tensor) -> Tensor:
    return gaussian_blur(images, sigmas, (blur_kernel_size(images.shape[-2]), blur_kernel_size(images.shape[-1])))


class Draws:
    """What they drew in one step, in the order in which it was drawn; ours draws the same at the same places."""

    def __init__(self, prefix: str, numbers: dict[str, Tensor]) -> None:
        self.numbers = {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}
        self.used = dict.fromkeys(("color", "order", "box", "grid", "choice"), 0)
        self.sigmas = self.numbers.get("sigmas", torch.zeros(0)).clone()

    def next(self, kind: str) -> Tensor:
        self.used[kind] += 1
        return self.numbers[f"{kind}.{self.used[kind] - 1}"]

    def box(self, *_: object) -> tuple[int, int, int, int]:
        top, below, left, right = self.next("box").tolist()
        return top, left, below - top, right - left

    def augment(self, monkeypatch: pytest.MonkeyPatch, images: Tensor, together: bool) -> Tensor:
        """They draw order and sigma for each mixed image, but once for all images of MIC."""
        done = []
        for part in [images] if together else images.split(1):
            part = jittered(part, self.next("order"), self.next("color"), monkeypatch)
            done.append(blurred(part, self.sigmas[:1].expand(len(part))))
            self.sigmas = self.sigmas[1:]
        return torch.cat(done)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mix, mask = t2sda.sample_class_mix, t2sda.mask_patches

        def sample_class_mix(y: Tensor, shown: Tensor, classes_from: str, generator: Generator) -> Tensor:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randperm", lambda n, **_: permutation(self.next("choice").long(), n))
                return mix(y, shown, classes_from, generator)

        def mask_patches(images: Tensor, block_size: int, ratio: float, generator: Generator) -> Tensor:
            with monkeypatch.context() as patch:
                patch.setattr(torch, "rand", lambda *shape, **_: same_shape(self.next("grid"), shape))
                return mask(images, block_size, ratio, generator)

        monkeypatch.setattr(t2sda, "sample_class_mix", sample_class_mix)
        monkeypatch.setattr(t2sda, "mask_patches", mask_patches)
        monkeypatch.setattr(t2sda, "draw_detail_box", self.box)
        monkeypatch.setattr(
            t2sda,
            "strong_augment",
            lambda batches, _: [self.augment(monkeypatch, x, together=place > 0) for place, x in enumerate(batches)],
        )


def permutation(first: Tensor, length: int) -> Tensor:
    """A permutation of `length` that begins with what they chose; they choose half of the classes, rounded up."""
    assert len(first) == (length + 1) // 2
    rest = [one for one in range(length) if one not in first.tolist()]
    return torch.cat([first, torch.tensor(rest, dtype=torch.int64)])


def same_shape(drawn: Tensor, shape: Sequence[int]) -> Tensor:
    assert drawn.shape == tuple(shape)
    return drawn


def config(*overrides: str) -> RunConfig:
    """A run of DAFormer's values: the feature distance is that of things."""
    things = f"--feature_distance.classes=[{', '.join(THING_CLASSES)}]"
    words = ["--model.pretrained=no file", "--loss_weights.feature_distance=0.005", things, *overrides]
    return without_data(load_config(None, words))


def networks_of(case: str, cfg: RunConfig, **fields: object) -> Networks:
    """Student and frozen encoder of one of their training checkpoints, which holds three networks."""
    tensors = checkpoint(case, ("model.", "ema_model.", "imnet_model."))
    student, frozen = (
        convert(pick_network(tensors, weights), drop_path_rate=0.0, classifier_dropout_prob=0.0, **fields)[0]
        for weights in ("student", "ImageNet")
    )
    engine = build_engine(cfg.translate)
    return Networks(student.train(), make_teacher(student), make_teacher(frozen.encoder).eval(), engine)


LOSSES = {  # our terms, with their weights -> theirs
    "source": ("decode.loss_seg", "decode.hr.loss_seg"),
    "feature_distance": ("src.loss_imnet_feat_dist",),
    "target": ("mix.decode.loss_seg", "mix.decode.hr.loss_seg"),
    "masked_consistency": ("masked.decode.loss_seg", "masked.decode.hr.loss_seg"),
}
DEEPLAB = "--model={size: resnet50c, head: deeplabv2}"
HRDA = [
    "--data={crop_size: [128, 128], outer_crop: false}",
    "--hrda={enabled: true, crop_size: [64, 64]}",
    "--uda={pseudo_threshold: 0.15, ignore_top: 0, ignore_bottom: 0}",
]


@pytest.mark.parametrize(
    ("case", "network", "file", "count", "side", "block", "overrides"),
    [
        (
            *("dacs_daformer", "mit_daformer", "daformer", 3, 64, 32),
            ["--uda={pseudo_threshold: 0.25, ignore_top: 2, ignore_bottom: 15}", "--loss_weights.pull=0"],
        ),
        (
            *("dacs_dlv2", "resnet_dlv2", "daformer", 1, 64, 32),
            [DEEPLAB, "--uda={ignore_top: 2, ignore_bottom: 15}", "--loss_weights={pull: 0, feature_distance: 0}"],
        ),
        (
            *("mic_hrda", "hrda_daformer", "mic", 2, 128, 64),
            [*HRDA, "--loss_weights={pull: 0, masked_consistency: 1}", "--patch_mask.block_size=16"],
        ),
    ],
)
def test_training_steps(monkeypatch, case, network, file, count, side, block, overrides):
    """Losses of several updates: what a wrong gradient, teacher, optimiser or buffer would do shows in the next."""
    cfg = config("--translate.engine=none", "--optim={lr: 6.0e-5, weight_decay: 0.01}", *overrides)
    networks, memory = networks_of(network, cfg, detail_crop_size=(64, 64)), ClassMemory(19, cfg.projector.dim)
    optimizer = make_optimizer(networks.student.encoder, networks.student, cfg.optim)
    for step in range(count):
        numbers = THEIRS[file]
        valid = torch.ones(2, side, side, dtype=torch.bool)
        if cfg.hrda.enabled:
            valid[:, :6] = valid[:, -30:] = valid[..., :4] = False
        batch = UdaBatch(
            image(f"{case} source {step}", (2, 3, side, side)),
            labels(f"{case} labels {step}", (2, side, side), block),
            image(f"{case} target {step}", (2, 3, side, side)),
            target_valid=valid,
        )
        terms: dict[str, Tensor] = {}
        with monkeypatch.context() as patch:
            Draws(f"{case}/{step}/", numbers).install(patch)
            for graph in t2sda.t2sda_losses(Step(batch, networks, cfg, memory, Generator(), Generator(), alone, step)):
                backward(graph.losses, cfg.loss_weights, networks.student.parameters())
                terms |= graph.losses
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(networks.teacher, networks.student, ema_momentum(step + 1, cfg.uda.ema_momentum))
        for name, others in LOSSES.items():
            known = [numbers[key] for other in others if (key := f"{case}/{step}/{other}") in numbers]
            assert bool(known) == (name in terms)
            if known:
                close(vars(cfg.loss_weights)[name] * terms[name], sum(known))


@pytest.mark.parametrize(("case", "tolerance"), [("hrda_daformer", 1e-4), ("hrda_dlv2", 5e-3)])
def test_training_losses_of_two_resolutions(case, tolerance):
    """Losses, and the sum of the gradients' absolute values. Theirs are of float64: 50 layers of float32 are rough."""
    cfg = config(*HRDA, "--translate.engine=none", "--loss_weights.pull=0", *([DEEPLAB] if "dlv2" in case else []))
    student = networks_of(case, cfg, detail_crop_size=(64, 64)).student
    pixels, y = normalize(image(f"{case} train", (2, 3, 128, 128))), labels(f"{case} train", (2, 128, 128))
    for index, weights in enumerate([None, (uniform(f"{case} weights", (2, 128, 128)) + 1) / 2]):
        prefix = f"{case}/train.{index}/"
        numbers = {k.removeprefix(prefix): v for k, v in THEIRS["hrda"].items() if k.startswith(prefix)}
        output = student(pixels, detail_box=Draws(prefix, THEIRS["hrda"]).box())
        loss = t2sda.fused_and_detail_loss(output, y, cfg, weights)
        close(loss, numbers["decode.loss_seg"] + numbers["decode.hr.loss_seg"], 1e-5)
        student.zero_grad()
        loss.backward()
        encoder = sum(p.grad.double().abs().sum() for p in student.encoder.parameters() if p.grad is not None)
        total = sum(p.grad.double().abs().sum() for p in student.parameters() if p.grad is not None)
        ours = torch.stack([encoder, total - encoder])
        close(ours / numbers["gradient"], torch.ones(2), tolerance)


# ------------------------------------------------------------------------------------------------ augmentation, data


@pytest.mark.parametrize("index", range(6))
def test_color_jitter(monkeypatch, index):
    numbers = THEIRS["daformer"]
    factors, order = numbers[f"jitter/{index}/color.0"], numbers[f"jitter/{index}/order.0"]
    ours = jittered(image(f"jitter {index}", (1, 3, 24, 32)), order, factors, monkeypatch)
    close(sample(normalize(ours)), numbers[f"jitter/{index}/out"])


@pytest.mark.parametrize(("index", "size"), [(0, (64, 96)), (1, (512, 128))])
def test_gaussian_blur(index, size):
    ours = blurred(image(f"blur {index}", (1, 3, *size)), THEIRS["daformer"][f"blur/{index}/sigmas"])
    close(sample(normalize(ours)), THEIRS["daformer"][f"blur/{index}/out"])


@pytest.mark.parametrize("factor", [8, 32])
def test_labels_of_the_feature_distance(factor):
    small = downscale_labels_by_share(labels("downscale", (2, 128, 96), 16), (128 // factor, 96 // factor), 19, 0.75)
    assert torch.equal(small, THEIRS["daformer"][f"downscale/{factor}"].long())


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_probabilities_of_rare_class_sampling(temperature):
    counts = (np.abs(uniform("rcs", (12, 19)).numpy()) ** 6 * 1e6).astype(np.int64)
    counts[:, [9, 16]] = 0
    ours = rare_classes(counts, temperature, 3000).probabilities
    prefix = f"rcs/{temperature}/"
    theirs = np.zeros(19)
    theirs[THEIRS["daformer"][f"{prefix}classes"]] = THEIRS["daformer"][f"{prefix}probabilities"]
    assert np.abs(ours - theirs).max() < 1e-5

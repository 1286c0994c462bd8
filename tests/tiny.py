"""A run, networks and a batch that fit in milliseconds, for tests of what stands above the mathematics."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from t2sda_hf.batch import UdaBatch
from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.methods import METHODS, ClassMemory, Graph, Networks, Step, make_networks
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation
from t2sda_hf.training.derive import without_data
from t2sda_hf.translate import build_engine

CLASSES = ("road", "building", "sky", "person", "car")
CROP, OUTER = (32, 64), (48, 96)
TINY = [
    f"--classes=[{', '.join(CLASSES)}]",
    "--model={pretrained: no file, head: all_mlp, depths: [1, 1, 1, 1], hidden_sizes: [8, 16, 24, 32], "
    "num_attention_heads: [1, 2, 3, 4], decoder_hidden_size: 16}",
    "--projector={hidden: 16, dim: 16}",
    f"--data={{crop_size: {list(CROP)}, outer_crop_size: {list(OUTER)}}}",
    "--uda={ignore_top: 2, ignore_bottom: 4, pseudo_threshold: 0.6}",
    "--translate.fda.beta=0.1",
    "--pull={num_queries: 16, num_negatives: 8}",
    "--loss_weights.feature_distance=0",
]


def tiny_config(*overrides: str) -> RunConfig:
    """A small run; `overrides` are those of the command line. Nothing here reads a pretrained encoder."""
    return without_data(load_config(None, [*TINY, *overrides]))


def small_recipe(folder: str, name: str, *overrides: str) -> RunConfig:
    """A recipe of configs/`folder` with a tiny network and tiny crops; everything else is its own."""
    path = Path(__file__).parents[1] / "configs" / folder / f"{name}.yaml"
    recipe = load_config(path)
    sizes = "[16, 16, 24, 32]" if recipe.model.head == "deeplabv2" else "[8, 16, 24, 32]"
    crop, outer = ("[64, 128]", "[96, 192]") if recipe.hrda.enabled else ("[32, 64]", "[48, 96]")
    return without_data(
        load_config(
            path,
            [
                f"--model={{depths: [1, 1, 1, 1], hidden_sizes: {sizes}, num_attention_heads: [1, 2, 3, 4]}}",
                "--model.decoder_hidden_size=8",
                "--projector={hidden: 8, dim: 8}",
                f"--data={{crop_size: {crop}, outer_crop_size: {outer}}}",
                "--hrda.crop_size=[32, 32]",
                "--uda={ignore_top: 2, ignore_bottom: 4}",
                "--pull={num_queries: 4, num_negatives: 8}",
                *overrides,
            ],
        )
    )


def tiny_model(cfg: RunConfig | None = None, seed: int = 0) -> T2SDAForSemanticSegmentation:
    """The student of `cfg`, a function of the seed."""
    cfg = cfg or tiny_config()
    torch.manual_seed(seed)
    return T2SDAForSemanticSegmentation(
        T2SDAConfig(
            encoder="resnet" if cfg.model.size.startswith("resnet") else "mit",
            depths=cfg.model.depths,
            hidden_sizes=cfg.model.hidden_sizes,
            num_attention_heads=cfg.model.num_attention_heads,
            decoder_hidden_size=cfg.model.decoder_hidden_size,
            head=cfg.model.head,
            classifier_dropout_prob=cfg.model.head_dropout,
            drop_path_rate=cfg.model.drop_path_rate,
            projector_in_index=cfg.projector.in_index
            or ((3,) if cfg.model.size.startswith("resnet") else (0, 1, 2, 3)),
            projector_hidden=cfg.projector.hidden,
            projector_dim=cfg.projector.dim,
            multi_resolution=cfg.hrda.enabled,
            detail_crop_size=cfg.hrda.crop_size,
            detail_crops_at_once=cfg.hrda.crops_at_once,
            num_labels=len(cfg.classes),
        )
    )


def tiny_networks(cfg: RunConfig, seed: int = 0) -> Networks:
    """Student in training mode, a teacher and a frozen encoder with other weights, and the run's engine."""
    student = tiny_model(cfg, seed).train()
    if cfg.model.activation_checkpointing:
        student.activation_checkpointing_enable()
    networks = make_networks(cfg, student, build_engine(cfg.translate))
    networks.teacher.load_state_dict(tiny_model(cfg, seed + 1).state_dict())
    head = networks.teacher.decode_head  # new ones predict every class with the same confidence
    for classifier in head.branches if cfg.model.head == "deeplabv2" else [head.classifier]:
        classifier.weight.data *= 100
    if networks.imagenet is not None:
        networks.imagenet.load_state_dict(tiny_model(cfg, seed + 2).encoder.state_dict())
    return networks


def tiny_batch(cfg: RunConfig, seed: int = 0) -> UdaBatch:
    """Two source and two target crops as they are on the device; blocks of 8 pixels of one class, some ignored."""
    random = Generator().manual_seed(seed)
    (height, width), (outer_height, outer_width) = cfg.data.crop_size, cfg.data.outer_crop_size
    blocks = torch.randint(0, len(cfg.classes) + 1, (2, height // 8, width // 8), generator=random)
    blocks[blocks == len(cfg.classes)] = 255
    outer = torch.rand(2, 3, outer_height, outer_width, generator=random)
    corner = torch.tensor([[3, 5], [outer_height - height, outer_width - width]])
    batch = UdaBatch(
        source_images=torch.empty(2, 3, height, width),
        source_labels=blocks.repeat_interleave(8, 1).repeat_interleave(8, 2),
        target_images=0.2 + 0.6 * torch.rand(2, 3, height, width, generator=random),
        outer_source=outer,
        style_reference=torch.rand(2, 3, outer_height, outer_width, generator=random) ** 2,
        inner_corner=corner,
    )
    batch.source_images.copy_(batch.crop_inner(outer))  # the crop is the window's
    return batch


def tiny_step(
    cfg: RunConfig,
    networks: Networks | None = None,
    batch: UdaBatch | None = None,
    index: int = 0,
    seed: int = 0,
    memory: ClassMemory | None = None,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Step:
    """A step of `cfg`; what is not given is that of `tiny_...`, and a process alone."""
    return Step(
        batch or tiny_batch(cfg),
        networks or tiny_networks(cfg),
        cfg,
        memory or ClassMemory(len(cfg.classes), cfg.projector.dim),
        Generator().manual_seed(seed),
        Generator().manual_seed(seed),
        sum_over_processes or alone,
        index,
    )


def tiny_graphs(cfg: RunConfig, *args: object, seed: int = 0, **fields: object) -> Iterator[Graph]:
    """What the method of `cfg` yields for `tiny_step`, with the networks' own randomness seeded, too."""
    step = tiny_step(cfg, *args, seed=seed, **fields)
    torch.manual_seed(seed)
    yield from METHODS[cfg.method](step)


def together(graphs: Iterable[Graph]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Losses and what was seen, of all graphs."""
    losses: dict[str, Tensor] = {}
    seen: dict[str, Any] = {}
    for graph in graphs:
        losses |= graph.losses
        seen |= graph.seen
    return losses, seen


def alone(statistics: Tensor) -> Tensor:
    """The sum over the processes of a run with one process."""
    return statistics

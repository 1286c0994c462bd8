"""Where the parts of a run meet: data, networks, objective, optimiser, evaluation."""

import json
import logging
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from ..config import RunConfig, dump_config
from ..data.domains import Domain, check_domain, load_domain
from ..data.pairs import PairDataset, batches
from ..data.rare_class_sampling import rare_classes
from ..evaluation.evaluator import evaluate_model
from ..methods import METHODS, Parts
from ..methods.parts import ClassMemory
from ..models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor, load_pretrained_encoder
from ..teacher import make_teacher, with_statistics_of
from ..translate import build_engine
from .distributed import broadcast_from_main
from .loop import Run, train
from .optim import make_optimizer
from .seeding import seed_initial_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Domains:
    """The three domains of a run, checked. `target` has no labels."""

    source: Domain
    target: Domain
    test: Domain
    source_counts: np.ndarray  # (images, K) pixels per class


def open_domains(cfg: RunConfig, accelerator: Accelerator) -> Domains:
    """Load and check what the run reads; every fault of the data shows here, before any training.

    Raises:
        ValueError: see `load_domain` and `check_domain`.
    """
    with accelerator.main_process_first():  # the others then read the cache
        source = load_domain(cfg.source, cfg.classes)
        target = load_domain(cfg.target, cfg.classes, labelled=False)
        test = load_domain(cfg.test, cfg.classes)
        source_counts = check_domain(source, cfg.classes)
        check_domain(target, cfg.classes)
        check_domain(test, cfg.classes)
    absent = [name for name, total in zip(cfg.classes, source_counts.sum(axis=0), strict=True) if not total]
    if absent:
        logger.warning("no source image shows %s: nothing can be learned about it.", ", ".join(absent))
    return Domains(source, target, test, source_counts)


def build_student(cfg: RunConfig) -> T2SDAForSemanticSegmentation:
    """The student with initial weights: a function of the seed, and of the pretrained encoder if there is one."""
    own_sizes = {
        name: value
        for name in ("depths", "hidden_sizes", "num_attention_heads")
        if (value := getattr(cfg.model, name)) is not None
    }
    config = T2SDAConfig.from_size(
        cfg.model.size,
        head=cfg.model.head,
        decoder_hidden_size=cfg.model.decoder_hidden_size,
        classifier_dropout_prob=cfg.model.head_dropout,
        drop_path_rate=cfg.model.drop_path_rate,
        encoder_ln_eps_fix=cfg.model.encoder_ln_eps_fix,
        projector_in_index=cfg.projector.in_index,
        projector_kernel=cfg.projector.kernel,
        projector_hidden=cfg.projector.hidden,
        projector_dim=cfg.projector.dim,
        projector_final_relu=cfg.projector.final_relu,
        id2label=dict(enumerate(cfg.classes)),
        label2id={name: index for index, name in enumerate(cfg.classes)},
        **own_sizes,
    )
    seed_initial_weights(cfg.seed)
    student = T2SDAForSemanticSegmentation(config)
    if cfg.model.pretrained is not None:
        load_pretrained_encoder(student, cfg.model.pretrained)
        logger.info("every tensor of the encoder was loaded from %s", cfg.model.pretrained)
    if cfg.model.activation_checkpointing:
        student.activation_checkpointing_enable()
    return student


def run_method(
    cfg: RunConfig, initial: T2SDAForSemanticSegmentation, domains: Domains, accelerator: Accelerator, folder: Path
) -> dict[str, Any]:
    """Train one method from a copy of the `initial` student and score it on the test domain. Collective.

    Writes into `folder`: resolved_config.yaml, scalars.jsonl, TensorBoard events, student/ (a from_pretrained folder;
    checkpoint-NNNNNN/student/ at every save), metrics.json.

    Returns:
        {"student": ..., "teacher": ...}, results of `evaluate_model`. No teacher for source_only.
    """
    student = deepcopy(initial).to(accelerator.device)
    broadcast_from_main(student, accelerator)
    imagenet = None
    if cfg.method == "t2sda" and cfg.loss_weights.feature_distance:
        # The frozen copy is taken before training, so it is the pretrained encoder itself.
        imagenet = make_teacher(student.segformer).eval()
    # "evaluation_mode" only means: no DDP wrapper. Autocast goes inside forward, losses stay float32.
    parts = Parts(
        student=accelerator.prepare_model(student, evaluation_mode=True),
        teacher=accelerator.prepare_model(make_teacher(student), evaluation_mode=True),
        imagenet=imagenet,
        translate=build_engine(cfg.translate),
        memory=ClassMemory(len(cfg.classes), cfg.projector.dim).to(accelerator.device),
    )
    rare = None
    if cfg.rcs.enabled:
        rare = rare_classes(domains.source_counts, cfg.rcs.temperature, cfg.rcs.min_pixels)
    dataset = PairDataset(cfg, domains.source, domains.target if cfg.method == "t2sda" else None, rare)
    image_size = domains.test.network_size()
    processor = T2SDAImageProcessor(size=image_size, resize="exact")

    def evaluate(model: nn.Module) -> dict[str, Any]:
        return evaluate_model(
            model,
            domains.test,
            image_size=image_size,
            classes=cfg.classes,
            accelerator=accelerator,
            mode=cfg.evaluation.mode,
            window=cfg.evaluation.window,
            stride=cfg.evaluation.stride,
            limit=cfg.evaluation.limit,
        )

    def save(target: Path) -> None:
        if accelerator.is_main_process:
            accelerator.unwrap_model(parts.student).save_pretrained(target)
            processor.save_pretrained(target)

    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "resolved_config.yaml").write_text(dump_config(cfg), encoding="utf-8")
    accelerator.wait_for_everyone()
    loader = batches(dataset, accelerator.process_index, accelerator.num_processes)
    optimizer = make_optimizer(student.segformer, student, cfg.optim)
    train(Run(cfg, folder, accelerator, parts, METHODS[cfg.method], iter(loader), optimizer, evaluate, save))

    results = {"student": evaluate(parts.student)}
    if cfg.method == "t2sda":
        results["teacher"] = evaluate(with_statistics_of(parts.teacher, parts.student))
    if accelerator.is_main_process:
        (folder / "metrics.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    accelerator.wait_for_everyone()
    return results

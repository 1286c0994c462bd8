"""Where the parts of a run meet: data, networks, objective, optimiser, evaluation."""

import logging
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import KwargsHandler
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..batch import UdaBatch, sent_ahead
from ..config import DomainConfig, RunConfig, TranslateConfig, hub_id, load_config, several
from ..data.contents import Contents, digest, file_contents
from ..data.domains import AnyDomain, Domain, Reading, domain_contents, load_domain, load_domains, read_domain
from ..data.few_labels import covering_order, how_many
from ..data.pairs import AHEAD, LabelledTarget, PairDataset, batches, bytes_per_batch
from ..data.rare_class_sampling import RareClasses, joint_shares_of_pixels, rare_classes
from ..data.translated import TranslatedFolder, open_translated
from ..device import choose_algorithms, make_accelerator
from ..errors import leave_signals_to_parent
from ..evaluation.inference import load_model, processor_for, to_pixel_values
from ..evaluation.run_folder import SELECTED
from ..evaluation.watch import Watch, read_selected
from ..listing import IMAGE_SUFFIXES, list_files, refuse_pointers
from ..methods import METHODS
from ..models import (
    T2SDAConfig,
    T2SDAForSemanticSegmentation,
    encoder_fields,
    load_pretrained_encoder,
)
from ..translate import TranslationEngine, build_engine
from ..translate.style_networks import ADAIN_FILES, RANDOMIZATION_FILES, find_weights
from ..translate.trained import NetworkTranslation
from .adapters import frozen_names, limit_training, merged, without
from .checkpoint import TRAINED
from .derive import Derived, Facts, derive, joint_frequencies, source_rare_classes
from .distributed import broadcast_from_main, decided_by_main, shards
from .loop import Run, train
from .parts import Parts, make_parts
from .resume import Start, config_of, describe, fingerprint, kept_values, load_run, locked, methods_of
from .scores import Evaluation
from .seeding import seed_initial_weights
from .stopping import StopRequest
from .store import Store, unasked

logger = logging.getLogger(__name__)

_PREDICTED = 32  # images of the target that say how often a model without its source sees each class


@dataclass(frozen=True)
class Domains:
    """The domains of a run, checked, and what translates the source, which may read files too.

    `facts` are what `settle` needs to know of them.
    `source` is the domain whose labels are learned: of target_only it is the target, and nothing else is learned from.
    Of source_free it is the target, too, without labels.
    `target` has no labels; None for a run that learns without such a one. `labelled_target` are the images of it whose
    labels are learned beside the source's, if there are any. `translated` holds images that were translated beforehand,
    if there are any.
    """

    source: AnyDomain
    target: AnyDomain | None
    test: AnyDomain
    facts: Facts
    translate: TranslationEngine
    translated: TranslatedFolder | None
    contents: Mapping[str, Contents]  # of all that is read, but the weights to start from
    labelled_target: Domain | None = None

    def adapted_to(self, cfg: RunConfig) -> AnyDomain | None:
        """The target, if the method learns from its images: the baseline of a run does not."""
        return self.target if cfg.self_trains else None

    @property
    def source_counts(self) -> np.ndarray:
        """(images, K) pixels per class of the source."""
        return self.facts.counts

    @property
    def source_pixels(self) -> np.ndarray:
        """(K,) int64 pixels per class of the source; of several as many, in the shares in which they are drawn."""
        counts = self.facts.counts
        if len(self.source.parts) == 1:
            summed: np.ndarray = counts.sum(axis=0)
            return summed
        return np.rint(counts.sum() * joint_shares_of_pixels(self.facts.counts_of_each, self.source.shares)).astype(int)

    def rare_classes(self, cfg: RunConfig) -> list[RareClasses | None]:
        """What source and `labelled_target` are drawn by; None: evenly."""
        few = self.facts.labelled_target
        if not cfg.rcs.enabled or cfg.method == "source_free":
            return [None, None]
        how = cfg.rcs.temperature, cfg.rcs.min_pixels, joint_frequencies(cfg, self.facts)
        return [source_rare_classes(cfg, self.facts), None if few is None else rare_classes(few[0], *how)]


def open_domains(cfg: RunConfig, accelerator: Accelerator) -> Domains:
    """Load and check what the run reads; every fault of the data shows here, before any training. Collective.

    Raises:
        ValueError: see `load_domain`, `check_domain`, `settle`, `build_engine` and `open_translated`.
    """
    with _one_by_one(accelerator):
        source = load_domains(cfg.labels_from, cfg.labelled, cfg.classes, labelled=cfg.method != "source_free")
        target = None
        if cfg.method not in ("generalization", "target_only"):
            target = load_domains("target", cfg.target, cfg.classes, labelled=False)
        test = load_domains("test", cfg.test, cfg.classes)
        read = read_domain(source, cfg.classes)
        contents = {f"{cfg.labels_from}_data": read.contents}
        target_sizes = None
        if target is not None:
            of_target = read_domain(target, cfg.classes)
            target_sizes, contents["target_data"] = of_target.sizes, of_target.contents
        of_test = read_domain(test, cfg.classes)
        contents["test_data"] = of_test.contents
        few, of_few = None, None
        if cfg.labelled_target is not None:
            few, of_few = open_labelled_target(cfg, cfg.labelled_target)
            contents["target_labelled_data"] = of_few.contents
    if len({part.input_size() for part in test.parts}) > 1:
        logger.warning(
            "the test domains are brought to different sizes: the model is saved with the input size of the first, %s.",
            test.parts[0].name,
        )
    if source.labelled and (shared := read.images & of_test.images):
        logger.warning(
            "warning: %d of the images that are learned with their labels are test images, too, so scores say nothing "
            "of new images: give %s and test different images.",
            *(len(shared), cfg.labels_from),
        )
    lengths = lengths_of(source), () if target is None else lengths_of(target)
    known = None if of_few is None else (of_few.counts, of_few.sizes)
    facts = Facts(read.counts, read.sizes, target_sizes, known, *lengths)
    cfg = settle(cfg, facts, accelerator).cfg
    engine = build_engine(cfg.translate if cfg.translates else TranslateConfig(engine="none"))
    folder = cfg.translate.trained.folder if cfg.translates and cfg.translate.engine == "trained" else ""
    largest = max(one.max_pixels for one in cfg.sources)
    translated = open_translated(folder, len(source), largest) if folder else None
    if cfg.translates:
        with _one_by_one(accelerator):  # once more: nobody may hold it in `settle`, where all wait for each other
            contents |= contents_of_translation(cfg.translate, engine, translated)
    return Domains(source, target, test, facts, engine, translated, contents, few)


def lengths_of(domain: AnyDomain) -> tuple[int, ...]:
    """For `Facts`: how many images each of several domains has; () of one."""
    return tuple(map(len, domain.parts)) if len(domain.parts) > 1 else ()


def open_labelled_target(cfg: RunConfig, config: DomainConfig) -> tuple[Domain, Reading]:
    """The target images whose labels are learned beside the source's, as many as target_labels says.

    Raises:
        ValueError: if there are not so many, or if test images are among them, also under other label maps.
    """
    domain = load_domain(config, cfg.classes)
    read = read_domain(domain, cfg.classes)
    images = [load_domain(one, cfg.classes, labelled=False) for one in (config, *cfg.tests)]
    learned, *tested = (set(domain_contents(found).digests[: len(found)]) for found in images)
    if shared := learned & set().union(*tested):
        raise ValueError(
            f"{len(shared)} of the labelled target images of {domain.name} are test images, so scores would say "
            "nothing of new images. Give target_labelled and test different images."
        )
    chosen = sorted(covering_order(read.counts, cfg.seed)[: how_many(cfg.target_labels, len(domain))])
    return replace(domain, table=domain.table.select(chosen)), read.of(chosen)


@contextmanager
def _one_by_one(accelerator: Accelerator) -> Iterator[None]:
    """The processes do this one after the other, so that all but the first read the cache.

    A lock, because the first may take longer than processes wait for each other in a collective.
    """
    with ExitStack() as held:
        if accelerator.num_processes > 1:
            held.callback(locked(Path(datasets.config.HF_DATASETS_CACHE) / "t2sda_hf.lock").release)
        yield


def settle(cfg: RunConfig, facts: Facts, accelerator: Accelerator) -> Derived:
    """The config with a value for everything that it leaves open; a run that goes on keeps its own. Collective.

    Raises:
        ValueError: see `derive`.
    """
    kept = decided_by_main(lambda: kept_values(cfg), accelerator, ValueError)
    cores = len(os.sched_getaffinity(0)) // processes_here(accelerator)
    return derive(cfg, facts, accelerator.num_processes, kept, cores)


def processes_here(accelerator: Accelerator) -> int:
    """How many processes of the run this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))  # set by a launcher


def build_student(cfg: RunConfig, random: bool = False) -> T2SDAForSemanticSegmentation:
    """The student with initial weights: a function of the seed, and of the pretrained encoder if there is one.

    Args:
        cfg: the run.
        random: leave out the pretrained weights, for those who only ask what a network costs.

    Raises:
        ValueError: for an encoder that cannot be found, built or loaded whole, or that does not fit the run.
    """
    if cfg.from_finished:
        with torch.device("cpu"):  # also where others only count what a network needs
            student = start_student(cfg)
        config: Any = student.config
        student = T2SDAForSemanticSegmentation(config) if random else student
        limit_training(student, cfg)
        return student
    if cfg.method == "distil" and not random:
        start_student(cfg)  # so that its faults show now
    own_sizes: dict[str, Any] = {
        name: value
        for name in ("depths", "hidden_sizes", "num_attention_heads", "decoder_hidden_size")
        if (value := getattr(cfg.model, name)) is not None
    }
    if cfg.hrda.crop_size is not None:
        own_sizes["detail_crop_size"] = cfg.hrda.crop_size
    if cfg.projector.in_index is not None:
        own_sizes["projector_in_index"] = cfg.projector.in_index
    automatic = cfg.model.size == "auto"
    if automatic:
        assert cfg.model.pretrained is not None  # by `ModelConfig.check`
        own_sizes |= encoder_fields(cfg.model.pretrained)
        if cfg.model.out_layers is not None:
            own_sizes["out_layers"] = cfg.model.out_layers
        if "backbone_config" in own_sizes:
            own_sizes["backbone_config"] = with_drop_path(own_sizes["backbone_config"], cfg.model.drop_path_rate)
        elif own_sizes.get("encoder") == "resnet":
            own_sizes.setdefault("projector_in_index", (3,))
    make = T2SDAConfig if automatic else partial(T2SDAConfig.from_size, cfg.model.size)
    config = make(
        head=cfg.model.head,
        head_dilations=cfg.model.head_dilations,
        classifier_dropout_prob=cfg.model.head_dropout,
        drop_path_rate=cfg.model.drop_path_rate,
        projector_kernel=cfg.projector.kernel,
        projector_hidden=cfg.projector.hidden,
        projector_dim=cfg.projector.dim,
        projector_final_relu=cfg.projector.final_relu,
        multi_resolution=cfg.hrda.enabled,
        detail_crops_at_once=cfg.hrda.crops_at_once,
        id2label=dict(enumerate(cfg.classes)),
        label2id={name: index for index, name in enumerate(cfg.classes)},
        **own_sizes,
    )
    seed_initial_weights(cfg.seed)
    student = T2SDAForSemanticSegmentation(config)
    if config.encoder == "backbone" and cfg.data.crop_size is not None:
        sizes = [cfg.data.crop_size]
        if cfg.hrda.enabled and cfg.hrda.crop_size is not None:
            sizes = [(cfg.data.crop_size[0] // 2, cfg.data.crop_size[1] // 2), cfg.hrda.crop_size]
        for height, width in sizes:
            student.backbone.refuse_size(height, width)
    if cfg.model.pretrained is not None and not cfg.model.random_start and not random:
        refuse_pointers(Path(cfg.model.pretrained))
        load_pretrained_encoder(student, cfg.model.pretrained)
        logger.info("every tensor of the encoder was loaded from %s", cfg.model.pretrained)
    limit_training(student, cfg)
    if cfg.model.activation_checkpointing:
        encoder = student.pretrained_encoder
        if not (isinstance(encoder, PreTrainedModel) and encoder.supports_gradient_checkpointing):
            raise ValueError(
                f"model.activation_checkpointing must be false for {cfg.model.pretrained}: {type(encoder).__name__} "
                "cannot be computed twice. For less memory lower train.batch_size and raise train.micro_batches."
            )
        student.activation_checkpointing_enable()
    return student


def networks_of(checkpoint: Path) -> tuple[T2SDAForSemanticSegmentation, T2SDAForSemanticSegmentation]:
    """Student and teacher of a checkpoint that holds what is trained alone, whole and with adapters merged.

    The rest is what it was at the start of the run: the encoder of `model.pretrained`.

    Raises:
        ValueError: if that encoder cannot be loaded any more, or is another one.
    """
    cfg = load_config(checkpoint.parent / "resolved_config.yaml", record=True)
    made: list[T2SDAForSemanticSegmentation] = []
    try:
        begun = build_student(cfg)
        for part in ("student", "teacher"):
            network, own = deepcopy(begun), load_file(checkpoint / part / TRAINED)
            if own.keys() != without(network.state_dict(), frozen_names(network)).keys():
                raise ValueError("other parts of it were trained.")
            network.load_state_dict(own, strict=False)
            made.append(merged(network).eval())
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the networks of {checkpoint} are the encoder of {cfg.model.pretrained or cfg.start_model} and what was "
            f"trained beside it, and they cannot be put together: {error} Bring that encoder back, or name "
            f"{checkpoint.parent / 'student'} alone, which is whole."
        ) from error
    return made[0], made[1]


def start_student(cfg: RunConfig) -> T2SDAForSemanticSegmentation:
    """The finished model that a run starts from, or distils, with its classes in the order of the run.

    A projector that a file does not hold is a function of the seed.

    Raises:
        ValueError: if it cannot be loaded, has other classes, or does not fit the run.
    """
    seed_initial_weights(cfg.seed)
    student, names = load_model(cfg.start_model)
    missing = [name for name in cfg.classes if name not in names]
    if missing:
        raise ValueError(
            f"start_model {cfg.start_model!r} knows {', '.join(names)}, and not {', '.join(missing)}. Set classes to "
            "some of those that it knows, under their names there."
        )
    if cfg.from_finished and student.config.multi_resolution != cfg.hrda.enabled:
        raise ValueError(
            f"hrda.enabled must be {str(student.config.multi_resolution).lower()}, as in start_model "
            f"{cfg.start_model!r}, got {str(cfg.hrda.enabled).lower()}."
        )
    if cfg.method == "source_free" and cfg.loss_weights.pull and student.config.head == "deeplabv2":
        raise ValueError(
            "loss_weights.pull must be 0 with method source_free for the deeplabv2 head of start_model "
            f"{cfg.start_model!r}: its classifier has no single row for a class."
        )
    rows = [names.index(name) for name in cfg.classes]
    classifiers = [student.decode_head, getattr(student, "scale_attention", None)]
    for head in (head for head in classifiers if head is not None):
        for classifier in getattr(head, "branches", None) or [head.classifier]:
            classifier.weight = nn.Parameter(classifier.weight.detach()[rows].clone())
            classifier.bias = nn.Parameter(classifier.bias.detach()[rows].clone())
            classifier.out_channels = len(rows)
    student.config.id2label = dict(enumerate(cfg.classes))
    student.config.label2id = {name: index for index, name in enumerate(cfg.classes)}
    return student


def with_drop_path(config: Any, rate: float) -> PreTrainedConfig:
    """The config of a backbone, or its dict, with the run's rate of dropped blocks, where the backbone knows one."""
    if isinstance(config, dict):
        config = AutoConfig.for_model(**config)
    if "drop_path_rate" in config.to_dict():
        config.drop_path_rate = rate
    return config


def accelerator_of(cfg: RunConfig, *handlers: KwargsHandler) -> tuple[Accelerator, RunConfig]:
    """The accelerator of this process, and the config with its precision: a launch may ask for bf16, too."""
    accelerator = make_accelerator(
        cfg.train.precision,
        log_with=list(cfg.train.log_with) or None,
        project_dir=cfg.output_dir,
        kwargs_handlers=list(handlers),
    )
    choose_algorithms(cfg.train.deterministic)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:  # each would train alone, into the same folder
        raise ValueError(
            f"{launched} processes were launched, but accelerate makes a run of {accelerator.num_processes} of each: "
            f"torch sees {torch.cuda.device_count()} GPUs here. Launch one process, launch for the CPU (--cpu), or "
            "install a torch that sees the GPUs."
        )
    if accelerator.mixed_precision == "bf16":
        cfg = replace(cfg, train=replace(cfg.train, precision="bf16"))
    return accelerator, cfg


def compile_networks(networks: Sequence[nn.Module], backend: str | Callable[..., Any]) -> None:
    """Let torch.compile have encoder, heads and projector of each network, at their first call in training.

    In place, so that no wrapper changes the names in a checkpoint, and copies (those that are evaluated) are not
    compiled. Piece by piece: what joins them takes the box of HRDA's detail, another one in every step, and each new
    one would be compiled anew.

    Args:
        networks: students and teachers.
        backend: `train.compile`, or a function in place of a backend of torch.compile.
    """
    how: dict[str, Any] = {"mode": "reduce-overhead"} if backend == "cuda_graphs" else {"backend": backend}
    for network in networks:
        encoder: nn.Module = network.encoder  # type: ignore[assignment]
        if network.config.encoder != "resnet":  # type: ignore[union-attr]
            # transformers takes a lock when its encoder runs for the first time, and a lock cannot be captured.
            size = getattr(encoder, "only_size", None) or (64, 64)
            with torch.no_grad():
                network(torch.zeros(1, 3, *size, device=next(encoder.parameters()).device), segment=False)
        for part in (encoder, network.decode_head, getattr(network, "scale_attention", None), network.projector):
            if isinstance(part, nn.Module):
                part.compile(**how, dynamic=False)


def contents_of_translation(
    cfg: TranslateConfig, engine: TranslationEngine, translated: TranslatedFolder | None
) -> dict[str, Contents]:
    """What the translation reads, by its name in the record of a run."""
    found: dict[str, Contents] = {}
    if translated is not None:
        files = [translated.folder / name for name in translated.files]
        found["translated_images"] = file_contents(files, translated.folder, "translated images")
    if isinstance(engine, NetworkTranslation):
        found["translator_weights"] = weights_contents(engine.network)
    if cfg.engine == "style" and cfg.style.images:
        files = list_files(Path(cfg.style.images), IMAGE_SUFFIXES).files
        found["style_images"] = file_contents(files, Path(cfg.style.images), "style images")
    if cfg.engine == "style":
        given = ((cfg.style.adain, ADAIN_FILES), (cfg.style.randomization, RANDOMIZATION_FILES))
        weights = [path for place, names in given if place for path in find_weights(place, names).values()]
        if weights:
            found["style_weights"] = file_contents(weights)
    return found


def weights_contents(network: nn.Module) -> Contents:
    """The contents of a network: its tensors."""
    tensors = sorted(network.state_dict().items())
    arrays = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() for _, tensor in tensors)
    return Contents("tensors", [name for name, _ in tensors], [digest(array.data) for array in arrays])


def contents_of_run(cfg: RunConfig, domains: Domains, initial: T2SDAForSemanticSegmentation) -> dict[str, Contents]:
    """All that a run reads, by its name in the record of a run."""
    read = cfg.model.pretrained is not None and not cfg.model.random_start and not cfg.from_finished
    start = {"start_weights": weights_contents(initial.pretrained_encoder)} if read else {}
    if cfg.start_model:
        start["finished_weights"] = weights_contents(initial if cfg.from_finished else start_student(cfg))
    return dict(domains.contents) | start


def records(
    cfg: RunConfig, domains: Domains, contents: Mapping[str, Contents], accelerator: Accelerator
) -> dict[str, dict[str, Any]]:
    """What each method of the run depends on, in the order they are trained; for `resume.plan`."""

    def read_by(own: RunConfig) -> dict[str, Contents]:
        kept = {f"{own.labels_from}_data", "start_weights"} | ({"target_data"} if own.self_trains else set())
        kept |= {"finished_weights"} if own.from_finished or own.method == "distil" else set()
        kept |= set() if own.labelled_target is None else {"target_labelled_data"}
        if own.translates:
            kept |= {"translated_images", "translator_weights", "style_images", "style_weights"}
        return {name: part for name, part in contents.items() if name in kept}

    labelled = fingerprint(domains.source, domains.source_counts)
    target = fingerprint(domains.target) if domains.target is not None else None
    return {
        method: describe(
            own := config_of(cfg, method),
            labelled if own.labels_from == "source" else None,
            target if own.self_trains else labelled if own.labels_from == "target" else None,
            read_by(own),
            contents["test_data"],
            accelerator,
        )
        for method in methods_of(cfg)
    }


def data_record(cfg: RunConfig, domains: Domains, described: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the run reads, for `write_data_record`; `described` is from `records`."""
    known = {kind: domains.contents.get(f"{kind}_data") for kind in ("source", "target", "target_labelled", "test")}
    rare = domains.rare_classes(cfg)[0]
    sampling = None if rare is None else rare.of_classes.tolist()
    learns_from_target = described[cfg.method]["target_data"] is not None
    unlabelled = domains.target if learns_from_target else None
    used = {"source": None, "target": unlabelled, "target_labelled": domains.labelled_target, "test": domains.test}
    used[cfg.labels_from] = domains.source
    return {
        "seed": cfg.seed,
        "domains": {
            kind: {"name": domain.name, "num_images": len(domain), "fingerprint": part.fingerprint}
            | _parts_record(domain, domains.facts.counts_of_each if kind == cfg.labels_from else ())
            for kind, domain in used.items()
            if domain is not None and (part := known[kind]) is not None
        },
        "on_hub": {role: any(hub_id(asdict(one)) for one in several(getattr(cfg, role))) for role in known},
        "classes": cfg.classes,
        "source_pixels": domains.source_pixels.tolist() if domains.source.labelled else [],
        "sampling": sampling,
    }


def _parts_record(domain: AnyDomain, counts: Sequence[np.ndarray]) -> dict[str, Any]:
    """Of several domains each one's name, number of images and, where known, pixels per class; {} of one."""
    if len(domain.parts) == 1:
        return {}
    parts: list[dict[str, Any]] = [{"name": part.name, "num_images": len(part)} for part in domain.parts]
    for part, of_part in zip(parts, counts if domain.labelled else (), strict=False):
        part["pixels"] = of_part.sum(axis=0).tolist()
    return {"parts": parts}


def run_method(
    cfg: RunConfig,
    initial: T2SDAForSemanticSegmentation,
    domains: Domains,
    accelerator: Accelerator,
    folder: Path,
    *,
    start: Start,
    record: Mapping[str, Any],
    stop: StopRequest,
    owned: Callable[[], None] = unasked,
) -> dict[str, Any]:
    """Train one method from a copy of the `initial` student and score it on the test domain. Collective.

    Writes into `folder`: resolved_config.yaml, scalars.jsonl, TensorBoard events, checkpoint-NNNNNN/, student/ (a
    from_pretrained folder), metrics.json.

    Args:
        cfg: of this method.
        initial: not changed.
        domains: see `open_domains`.
        accelerator: of this process.
        folder: of this method.
        start: where it starts, from `resume.plan`.
        record: what it depends on, from `records`.
        stop: signals are noted there.
        owned: see `Store`.

    Returns:
        {"student": ..., "teacher": ...}, results of `evaluate_model`. No teacher where labels alone teach.

    Raises:
        Stopped, NotFinite, CheckpointError: see `train`.
        DamagedCheckpoint: if the checkpoint to start from cannot be used.
    """
    if start.results is not None:
        return start.results
    parts, like = build_parts(cfg, initial, domains, accelerator)
    evaluation = Evaluation(cfg, accelerator, domains.source, domains.test, like, stop, domains.adapted_to(cfg))
    processor = processor_for(domains.test.input_size())
    store = Store(folder, cfg, accelerator, processor, like, record, owned)
    store.open()
    progress = load_run(start.checkpoint, parts, accelerator)
    store.forget_selected_after(progress.step)
    with closing(read_batches(cfg, domains, accelerator, progress.step)) as batches:
        run = Run(cfg, accelerator, parts, METHODS[cfg.method], stop.waiting(batches))
        results = train(run, evaluation, store, stop, progress)
    return finish(initial, evaluation, store, results)


def build_parts(
    cfg: RunConfig, initial: T2SDAForSemanticSegmentation, domains: Domains, accelerator: Accelerator
) -> tuple[Parts, nn.Module]:
    """The parts of a run at its start, and a student that is not sharded, see `whole_network`."""
    student: Any = deepcopy(initial)
    sharded = shards(accelerator)
    if not sharded:  # which may be too large to be whole on the device together with its teacher
        student = student.to(accelerator.device)
        broadcast_from_main([*student.parameters(), *student.buffers()], accelerator)
    counts = domains.source_pixels
    if cfg.method == "source_free":
        counts = predicted_pixels(initial, domains.source)
    watch = Watch(counts.tolist(), cfg.uda.pseudo_threshold).to(accelerator.device)
    finished = start_student(cfg).to(accelerator.device) if cfg.method == "distil" else None
    parts = make_parts(cfg, student, domains.translate, accelerator, watch, finished)
    if cfg.train.compile != "none":
        compile_networks([parts.networks.student, parts.networks.teacher], cfg.train.compile)
    if not sharded:
        return parts, initial
    return parts, accelerator.prepare_model(deepcopy(initial), evaluation_mode=True)


@torch.no_grad()
def predicted_pixels(model: T2SDAForSemanticSegmentation, domain: AnyDomain) -> np.ndarray:
    """(K,) pixels per class as a model sees some images of a domain: they stand for the source's labels."""
    training, counts = model.training, np.zeros(model.config.num_labels or 0, dtype=np.int64)
    model.eval()
    for index in np.unique(np.linspace(0, len(domain) - 1, _PREDICTED).astype(int)):
        pixels = to_pixel_values(domain.resized_image(int(index)), None, model.device)
        counts += np.bincount(model(pixels).logits.argmax(dim=1).flatten().cpu().numpy(), minlength=len(counts))
    model.train(training)
    return counts


def read_batches(
    cfg: RunConfig, domains: Domains, accelerator: Accelerator, step: int
) -> Generator[UdaBatch, None, None]:
    """The micro-batches of this process from an update on. Closed, it leaves no worker behind.

    Raises:
        RuntimeError: where a batch is asked for and a worker that would read it is gone.
    """
    cfg = replace(cfg, data=replace(cfg.data, num_workers=workers_that_fit(cfg, processes_here(accelerator))))
    rare, rare_few = domains.rare_classes(cfg)
    few = domains.labelled_target
    labelled = None if few is None else LabelledTarget(few, cfg.data.target_labelled_share, rare_few)
    target = domains.adapted_to(cfg)
    source = None if cfg.method == "source_free" else domains.source
    dataset = PairDataset(cfg, source, target, rare, domains.translated, labelled_target=labelled)
    on_gpu = accelerator.device.type == "cuda"
    loader = batches(dataset, accelerator.process_index, accelerator.num_processes, step, pin=on_gpu)
    loader.worker_init_fn = leave_signals_to_parent
    others, raised_anywhere = active_children(), signal.getsignal(signal.SIGCHLD)
    loaded = iter(loader)
    workers = [child for child in active_children() if child not in others]
    if workers and current_thread() is main_thread():
        # torch would raise out of a signal's handler, in the middle of an update or of a save. It looks after its
        # workers also while it waits for a batch. Its handler stays from the first loader of a process on.
        torchs = str(getattr(raised_anywhere, "__module__", "")).startswith("torch.utils.data")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs or raised_anywhere is None else raised_anywhere)
    try:
        yield from sent_ahead(loaded, accelerator.device)
    except (RuntimeError, ConnectionError, EOFError) as error:  # it may die while it hands over
        ended = [worker.exitcode for worker in workers if worker.exitcode]
        if not ended:
            raise
        raise RuntimeError(
            f"a worker that reads data was ended {_by(ended[0])}. If memory ran out, lower data.num_workers."
        ) from error
    finally:
        for worker in workers:
            worker.kill()  # one that hangs would be waited for


def workers_that_fit(cfg: RunConfig, num_processes: int) -> int:
    """How many of `data.num_workers` may work: all that they hand over lies in /dev/shm until it was taken.

    Where that is full, batches get lost, and the run would wait for ever. Containers have 64 MB by default.

    Args:
        cfg: of the run.
        num_processes: of this machine, which share /dev/shm.
    """
    asked, memory = cfg.data.num_workers, Path("/dev/shm")
    if not asked or not memory.is_dir():
        return asked
    free, batch = shutil.disk_usage(memory).free / num_processes, 1.25 * bytes_per_batch(cfg)
    fits = max(0, int((free - batch) // (AHEAD * batch)))
    if fits < asked:
        logger.warning(
            "/dev/shm has %.0f MB free, and %d data workers would hand over up to %.0f MB there: %d of them work. Give "
            "the container more (docker run --shm-size=1g), or lower data.num_workers.",
            free * num_processes / 1e6,
            asked,
            (asked * AHEAD + 1) * batch / 1e6,
            fits,
        )
    return min(asked, fits)


def _by(exitcode: int) -> str:
    return f"by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"with exit code {exitcode}"


def finish(
    initial: T2SDAForSemanticSegmentation, evaluation: Evaluation, store: Store, results: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Score the weights that were kept beside the last, if there are any, and write down all results. Collective."""
    accelerator = store.accelerator
    kept = decided_by_main(lambda: read_selected(store.folder), accelerator)  # the folder may lie on its disk alone
    if store.cfg.select != "last" and kept is not None:
        selected: Any = deepcopy(merged(initial)).to(accelerator.device)
        if accelerator.is_main_process:
            weights = T2SDAForSemanticSegmentation.from_pretrained(store.folder / SELECTED).state_dict()
            selected.load_state_dict(weights)
        broadcast_from_main([*selected.parameters(), *selected.buffers()], accelerator)
        results["selected"] = evaluation.score(accelerator.prepare_model(selected, evaluation_mode=True)) | kept
    if store.cfg.from_finished or store.cfg.method == "distil":
        first = merged(initial) if store.cfg.from_finished else start_student(store.cfg)
        whole: Any = deepcopy(first).to(accelerator.device)
        results["start"] = evaluation.score(accelerator.prepare_model(whole, evaluation_mode=True))
    store.close(results)
    return results

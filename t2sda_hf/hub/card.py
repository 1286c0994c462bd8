"""The model card: facts are read from the files of a run, never typed; the card is a function of the facts.

`run.json` holds what only the machine knows at the start of a run (`record_run`), `resolved_config.yaml` and
`metrics.json` the rest. A fact that is missing is an error: a card with holes reads like a result.
"""

import html
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from safetensors import safe_open

from ..config import (
    SUPERVISED,
    DomainConfig,
    RunConfig,
    domain_names,
    hub_id,
    load_config,
    only,
    said_of_target_labels,
    several,
)
from ..evaluation.run_folder import DATA_RECORD
from ..masking import mask
from ..storage import read_json, write_json

RUN_FACTS = ("command", "commit", "hardware", "software")
OTHER_FACTS = ("start", "note", "code")  # what only a person knows, see `gather_facts`
PAPER = "[Pulling Target to Source, arXiv 2305.13752](https://arxiv.org/abs/2305.13752)"
METHODS = {
    "t2sda": f"T2S-DA: mean-teacher self-training with the pull loss ({PAPER})",
    "source_only": "supervised training on the source domain alone, no adaptation",
    "target_only": "supervised training on labels of the target domain itself, an upper bound for adaptation",
    "source_free": "self-training of a finished model on images of the target, without any source",
    "distil": "a small student of a finished model, taught on source and target",
    "generalization": "T2S-DA without a target: the pull loss between source images and other styles of them "
    f"({PAPER})",
}
DRAWN = ("streets-source", "streets-target", "streets-simulator", "streets-night")
DRAWN_TERMS = "drawn by t2sda_hf itself, Apache-2.0"
PACKAGE = Path(__file__).parents[1]
# How Hub ids of encoders begin, and under which licence their weights come: a model that starts from them does, too.
LICENCES = {
    "facebook/dinov2-": "Apache-2.0",
    "facebook/dinov3-": "the DINOv3 licence, which its users accept on the Hub",
    "facebook/convnext-": "Apache-2.0",
    "microsoft/swin": "Apache-2.0",
    "nvidia/mit-": "NVIDIA's licence for SegFormer: research and evaluation only",
}


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says. All scores in %, None for a class that is neither labelled nor predicted.

    Attributes:
        repo_id: user/name on the Hub.
        method, seed, steps, batch_size, num_processes, crop_size: of the training; batch_size per process and domain.
        host: encoder, head and what they start from, in words.
        base_model: Hub id of the encoder's weights, "" for random ones and those of a folder.
        parameters: number of trained numbers in the file, the projector's included.
        classes: position = class id.
        domains: source, target, perhaps target_labelled, and test, each {"name", "split", "terms", "id"}, where "id"
            is that of a data set of the Hub, otherwise ""; no target in domain generalisation, no source of an upper
            bound.
        license: Hub id, of the weights.
        image_size: (height, width) that every image is brought to, or None for the image's own.
        keep_ratio: images are fitted into `image_size` instead, in their own shape.
        window, stride: of the sliding window, None for the whole image at once.
        num_images: how many test images were scored.
        student, teacher, source_only: {"miou", "pixel_accuracy", "mean_accuracy", "iou": {class: score}}. No teacher
            where labels alone teach, and there `source_only` is the student.
        source_only_seed: of that run.
        note: what else a reader of the scores must know, "" for nothing.
        remarks: what the run itself says of its scores, for instance that the gain is within their noise.
        code: URL of a git repository from which t2sda_hf is installed, "" if nobody said one.
        command, commit, hardware, software: see `record_run`.
    """

    repo_id: str
    method: str
    host: str
    base_model: str
    parameters: int
    classes: tuple[str, ...]
    domains: dict[str, dict[str, str]]
    license: str
    seed: int
    steps: int
    batch_size: int
    num_processes: int
    crop_size: tuple[int, int]
    image_size: tuple[int, int] | None
    keep_ratio: bool
    window: tuple[int, int] | None
    stride: tuple[int, int] | None
    num_images: int
    student: dict[str, Any]
    teacher: dict[str, Any] | None
    source_only: dict[str, Any]
    source_only_seed: int
    note: str
    remarks: tuple[str, ...]
    code: str
    command: str
    commit: str
    hardware: str
    software: str

    @property
    def labelled(self) -> dict[str, str]:
        """The domain whose labels were learned: without a source it is the target."""
        return self.domains["source" if "source" in self.domains else "target"]

    @property
    def supervised(self) -> bool:
        """Whether labels alone taught, so that there is nothing to compare with."""
        return self.method in SUPERVISED

    @property
    def not_measured(self) -> list[str]:
        """What a reader might take for granted and nobody looked at."""
        elsewhere = f"Other domains than {self.domains['test']['name']} ({self.domains['test']['split']})"
        if "source" in self.domains:
            elsewhere += ", and the source domain itself: what adaptation costs there is unknown"
        gaps = [
            f"Other seeds: this is one run with seed {self.seed}. The spread over seeds is not in this card.",
            f"{elsewhere}.",
            "Corrupted images, night, snow and other cameras; calibration of the confidences; speed on a device.",
        ]
        if self.seed != self.source_only_seed:
            gaps.insert(0, f"Both columns from one seed: the source-only run has seed {self.source_only_seed}.")
        if not self.note and self.domains.get("target", self.domains["test"])["name"] == self.domains["test"]["name"]:
            gaps.append(
                "Independence of settings and test images: if settings were chosen by looking at this test split, the "
                "scores are optimistic."
            )
        return gaps


_TEXTS = {"note", "start", "terms", "remarks"}  # keys of what a person or the run says in words
_CLASSES = {"classes", "class_names", "label_map", "label_ids", "label_colors"}  # keys of names that may hold a /
# A path from the root, from a home or from the folder above: not the end of a relative one, nor of a URL.
_PLACE = re.compile(r"(?<![\w:/.~-])(?:~[\w-]*|\.\.)?(?:/[^\s/'\"{}\[\],;:=]+)+/?")


def record_run(folder: Path, command: str, num_processes: int = 1) -> None:
    """Write `run.json`: the command that repeats the run, the commit, the machine and the versions.

    A run that goes on keeps the record of its start; another commit is added to it.

    Args:
        folder: of the run; made if it is not there.
        command: the whole command line.
        num_processes: that it started.
    """
    path, commit = folder / "run.json", _commit()
    if facts := read_json(path):
        if commit not in str(facts.get("commit")):
            facts["commit"] = f"{facts.get('commit')}, went on with {commit}"
            write_json(path, facts)
        return
    threads = os.environ.get("OMP_NUM_THREADS")  # another number of threads adds in another order
    setting = f"OMP_NUM_THREADS={threads} " if threads else ""
    facts = {
        "command": mask(setting + command),
        "commit": commit,
        "hardware": _hardware(num_processes),
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def cpu_name() -> str:
    """The model of this machine's processor; its architecture where the system does not say more."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def gather_facts(run_folder: Path, repo_id: str, given: Mapping[str, Any] | None = None) -> CardFacts:
    """Read the facts of a finished run.

    Args:
        run_folder: the output folder of a run (its adapted method is taken), or one method's folder in it.
        repo_id: user/name.
        given: facts that the files do not hold, or that win over them: `license`, `terms` ({"source": ..., "target":
            ..., "test": ...}), `source_only` (a method folder), `start` (what the weights in a local model.pretrained
            are), `note` (what else a reader of the scores must know), and those of run.json.

    Raises:
        ValueError: naming the fact that is missing or the file that cannot be read, and where to give it.
    """
    given = dict(given or {})
    folder = method_folder(run_folder)
    cfg = load_config(_existing(folder / "resolved_config.yaml"), record=True)
    refuse_started(cfg)
    metrics = _read_json(folder / "metrics.json")
    push, slides = cfg.push_to_hub, cfg.evaluation.mode == "slide"
    start = placeless(str(given.get("start") or push.start), "start")
    terms = placeless(push.terms | dict(given.get("terms") or {}), "terms")
    lacks: list[str] = []  # all are told at once
    run = ask(lacks, _run_facts, folder, given)
    ask(lacks, check_start, cfg, start)
    license_id = ask(lacks, _license, cfg, str(given.get("license") or push.license))
    on_hub = (read_json(folder.parent / DATA_RECORD) or {}).get("on_hub", {})
    domains = {role: ask(lacks, domain_facts, cfg, role, terms, on_hub) for role in domains_of(cfg)}
    baseline = ask(lacks, _baseline, folder, cfg, metrics, str(given.get("source_only") or push.source_only))
    processor = ask(lacks, _read_json, folder / "student" / "preprocessor_config.json")
    parameters = ask(lacks, _count_parameters, folder / "student")
    refuse(lacks)
    size, summary = processor.get("size"), _summary(folder)
    return CardFacts(
        repo_id=repo_id,
        method=cfg.method,
        host=_host(folder, cfg, start),
        base_model="" if start or cfg.model.random_start else cfg.model.pretrained or "",
        parameters=parameters,
        classes=cfg.classes,
        domains=domains,
        license=license_id,
        seed=cfg.seed,
        steps=cfg.train.max_steps,
        batch_size=cfg.train.batch_size * cfg.train.micro_batches,
        num_processes=int(summary.get("num_processes", 1)),
        crop_size=cfg.data.crop_size,
        image_size=(size["height"], size["width"]) if size else None,
        keep_ratio=bool(size) and processor.get("resize") == "keep_ratio",
        window=cfg.evaluation.window if slides else None,
        stride=cfg.evaluation.stride if slides else None,
        num_images=metrics["student"]["num_images"],
        student=_scores(metrics["student"]),
        teacher=_scores(metrics["teacher"]) if "teacher" in metrics else None,
        source_only=_scores(baseline[1]["student"]),
        source_only_seed=load_config(_existing(baseline[0] / "resolved_config.yaml"), record=True).seed,
        note=placeless(str(given.get("note") or push.note), "note"),
        remarks=tuple(placeless(str(one), "remarks") for one in _said_of_target_labels(cfg) + summary.get("notes", [])),
        code=str(given.get("code") or _repository()),
        **run,
    )


def ask(lacks: list[str], call: Callable[..., Any], *args: Any) -> Any:
    """`call(*args)`; what it lacks is added to `lacks`, and None comes back."""
    try:
        return call(*args)
    except ValueError as error:
        lacks.append(str(error))
        return None


def refuse(lacks: Sequence[str]) -> None:
    """Raise one ValueError of all `lacks`, if there are any."""
    if lacks:
        raise ValueError(" Also: ".join(lacks))


def save_facts(facts: CardFacts, path: Path) -> None:
    path.write_text(json.dumps(asdict(facts), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_facts(path: Path) -> CardFacts:
    """Facts as `save_facts` wrote them.

    Raises:
        ValueError: if one is missing or unknown.
    """
    values = {"keep_ratio": False} | _read_json(path)  # cards of earlier releases do not say it
    names = {field.name for field in fields(CardFacts)}
    if names != values.keys():
        raise ValueError(
            f"{path} is not the facts of a card: missing {sorted(names - values.keys())}, "
            f"unknown {sorted(values.keys() - names)}."
        )
    for name in ("classes", "crop_size", "image_size", "window", "stride", "remarks"):
        values[name] = None if values[name] is None else tuple(values[name])
    return CardFacts(**values)


def render_card(facts: CardFacts) -> ModelCard:
    """The card, a function of the facts alone. It shows `panel.png` and `curve.png`, which stand beside it."""
    test = facts.domains["test"]
    of_classes = ((f"IoU ({name})", "iou", iou) for name, iou in facts.student["iou"].items())
    scores = [("mIoU", "mean_iou", facts.student["miou"]), *of_classes]
    results = [_eval_result(name, kind, score, test) for name, kind, score in scores if score is not None]
    data = ModelCardData(
        license=facts.license,
        license_name="see-the-card" if facts.license == "other" else None,
        license_link="README.md" if facts.license == "other" else None,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        base_model=facts.base_model or None,
        metrics=["mean_iou"],
        datasets=sorted({domain["id"] for domain in facts.domains.values()} - {""}) or None,
        tags=["semantic-segmentation", "domain-adaptation", "t2s-da", "custom_code", "arxiv:2305.13752"],
        model_name=facts.repo_id.split("/")[-1],
        eval_results=results,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_template()),
        facts=facts,
        method=METHODS[facts.method],
        as_text=as_text,
        as_name=as_name,
        classes=", ".join(map(as_name, facts.classes)),
        cell=lambda value: "-" if value is None else f"{value:.2f}",
        gain=lambda new, old: "-" if new is None or old is None else f"{new - old:+.2f}",
    )


def as_text(text: str) -> str:
    """A text of the user's in a card: one line that is no heading, no list and no raw HTML. Inline code stays."""
    return re.sub(r"^([#=+~-])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def as_name(text: str) -> str:
    """A name in a card: it means nothing to Markdown, also in a cell of a table."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def render_results(facts: CardFacts) -> str:
    """`.eval_results/*.yaml` of the Hub, which takes the place of the model-index of a card; "" without a data set.

    The Hub wants the id of a data set of its own there, and takes no other file.
    """
    test = facts.domains["test"]
    if not test["id"]:
        return ""
    notes = f"mIoU in % over {len(facts.classes)} classes, {facts.num_images} images of the split {test['split']}"
    entry = EvalResultEntry(test["id"], "default", round(facts.student["miou"], 2), notes=notes)
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def placeless(value: Any, key: str = "") -> Any:
    """A tree of settings, in which every path of this machine is its last part: where it lies is nobody's business.

    Args:
        key: of the setting. Names of classes stay as they are; in `_TEXTS`, which may hold several paths, each is cut.
    """
    if isinstance(value, Mapping):
        return {name: placeless(one, key if key in _TEXTS | _CLASSES else name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [placeless(one, key) for one in value]
    if not isinstance(value, str) or not value or key in _CLASSES:
        return value
    is_path = key not in _TEXTS and re.match(r"/|(~[\w.-]*|\.\.)(/|$)", value)
    if is_path or ("/" in value and os.path.exists(value)):
        return Path(value).name
    return _PLACE.sub(lambda found: Path(found[0]).name, value)


def method_folder(run_folder: Path) -> Path:
    """`run_folder` if it is one method's, or else the folder in it of the method that was adapted.

    Raises:
        ValueError: if there is no finished run.
    """
    for folder in (
        run_folder,
        *(run_folder / method for method in ("t2sda", "generalization", "source_free", "distil", *SUPERVISED)),
    ):
        if (folder / "metrics.json").is_file() and (folder / "student").is_dir():
            return folder
    raise ValueError(
        f"{run_folder} holds no finished run: there is no metrics.json with a student/ beside it. Give the output_dir "
        "of `t2sda train`, or a method's folder in it."
    )


def _run_facts(folder: Path, given: Mapping[str, Any]) -> dict[str, str]:
    path = folder.parent / "run.json"
    known = _read_json(path) if path.is_file() else {}
    known |= {name: given[name] for name in RUN_FACTS if given.get(name)}
    missing = [name for name in RUN_FACTS if not known.get(name)]
    if missing:
        raise ValueError(
            f"{path} does not say {', '.join(missing)}, and a card must. Give "
            + " ".join(f'--fact {name}="..."' for name in missing)
            + "."
        )
    facts = {name: str(known[name]) for name in RUN_FACTS}
    return facts | {"command": shlex.join(_placeless_words(shlex.split(facts["command"])))}


def _placeless_words(words: Sequence[str]) -> Iterator[str]:
    """The words of a command after `placeless`, each by its key: --KEY=VALUE or --KEY VALUE."""
    key = ""
    for word in words:
        flag, equals, value = word.partition("=")
        if not word.startswith("--"):
            yield placeless(word, key)
            key = ""
            continue
        key = flag.rpartition(".")[2].removeprefix("--")
        yield f"{flag}{equals}{placeless(value, key)}"


def _baseline(folder: Path, cfg: RunConfig, metrics: dict[str, Any], given: str) -> tuple[Path, dict[str, Any]]:
    if cfg.supervised:
        return folder, metrics
    other = Path(given) if given else folder.parent
    other = other / "source_only" if (other / "source_only").is_dir() else other
    config = other / "resolved_config.yaml"
    if not (other / "metrics.json").is_file() or load_config(_existing(config), record=True).method != "source_only":
        raise ValueError(
            f"there is no source-only run to compare {folder} with. Train with --baseline source_only, or give the "
            "folder of one with --source_only (push_to_hub.source_only)."
        )
    baseline = _read_json(other / "metrics.json")
    ours, theirs = metrics["student"], baseline["student"]
    for key in ("domain", "num_images"):
        if ours[key] != theirs[key]:
            raise ValueError(f"{other} was scored on another test: {key} {theirs[key]!r}, this run has {ours[key]!r}.")
    tests = [result.get("inputs", {}).get("data") for result in (ours, theirs)]
    if None not in tests and tests[0] != tests[1]:
        raise ValueError(
            f"{other} was scored on other images or label maps of {ours['domain']} than this run. Score it again: "
            "`t2sda train` of its config with --resume auto."
        )
    if list(ours["iou"]) != list(theirs["iou"]):
        raise ValueError(f"{other} has other classes: {', '.join(theirs['iou'])}; this run {', '.join(ours['iou'])}.")
    return other, baseline


def domains_of(cfg: RunConfig) -> dict[str, DomainConfig]:
    """Source, target, target_labelled and test, without those that the run does without."""
    what = "a model card takes one domain of each role"
    source, target, test = (only(domains, what) for domains in (cfg.source, cfg.target, cfg.test))
    roles = {"source": source, "target": target, "target_labelled": cfg.target_labelled, "test": test}
    if not cfg.target_labelled.path or cfg.labelled_target is None:
        del roles["target_labelled"]
    without = {"generalization": "target", "target_only": "source"}.get(cfg.method)
    return {role: domain for role, domain in roles.items() if role != without}


def _said_of_target_labels(cfg: RunConfig) -> list[str]:
    said = said_of_target_labels(asdict(cfg))
    return [f"{said.removesuffix('.')}, by both methods that are compared."] if said else []


def refuse_started(cfg: RunConfig) -> None:
    """ValueError for a method of which a card could not say what its start model had learned."""
    if cfg.from_finished or cfg.method == "distil":
        raise ValueError(
            f"there is no model card for method {cfg.method} with a start_model yet: what that model had learned, and "
            "under which terms, is not known here. Publish its student/ with `hf upload` and a card of your own."
        )


def check_start(cfg: RunConfig, start: str) -> None:
    """ValueError if the encoder starts from a folder or file and nobody says what is in it."""
    pretrained = cfg.model.pretrained
    if pretrained and not start and (pretrained.count("/") != 1 or Path(pretrained).exists()):
        raise ValueError(
            f"what are the weights in {pretrained!r}, which the encoder starts from? Readers of the card do not have "
            'them. Give --fact start="...", or push_to_hub.start in the config.'
        )


def domain_facts(
    cfg: RunConfig, role: str, terms: Mapping[str, str], on_hub: Mapping[str, bool] | None = None
) -> dict[str, str]:
    """Name, split, terms and perhaps the Hub's id of a domain; ValueError if the terms are not known.

    Args:
        cfg, role: of it.
        terms: by role.
        on_hub: by role, as data.json has it, for who may stand elsewhere than the run did.
    """
    config = domains_of(cfg)[role]
    known = terms.get(role) or (DRAWN_TERMS if config.path in DRAWN else "")
    if not known:
        raise ValueError(
            f"under which terms do the images of the {role} domain {config.path!r} come? Give "
            f'--terms {role}="...", or push_to_hub.terms in the config.'
        )
    tree = asdict(cfg)
    for role_of_path, found in (on_hub or {}).items():
        if isinstance(tree[role_of_path], dict):
            tree[role_of_path]["on_hub"] = found
    name, hub = domain_names(tree)[role], hub_id(tree[role])
    return {"name": name, "split": config.split, "terms": known, "id": hub}


def _license(cfg: RunConfig, given: str) -> str:
    found = given or own_license(cfg)
    if not found:
        brought = licence_of(cfg.model.pretrained or "")
        said = f" That encoder comes under {brought}." if brought else ""
        raise ValueError(
            f"the licence of the weights is not known: they start from {cfg.model.pretrained!r} and saw "
            f"{several(cfg.labelled)[0].path!r} and {cfg.targets[0].path!r}.{said} Give --license, or "
            "push_to_hub.license in the config."
        )
    return found


def _repository() -> str:
    """Where the metadata of the package say that its code is; "" if they do not."""
    urls = dict(url.split(", ", 1) for url in metadata("t2sda_hf").get_all("Project-URL") or ())
    return str(urls.get("Repository", ""))


def licence_of(pretrained: str) -> str:
    """Under which licence the weights of a Hub id come, in words; "" if that is not known here."""
    return next((words for begins, words in LICENCES.items() if pretrained.startswith(begins)), "")


def own_license(cfg: RunConfig) -> str:
    """The licence of weights that nothing but this project's own drawings went into, otherwise ""."""
    read = (*several(cfg.labelled), *cfg.targets, cfg.labelled_target or cfg.targets[0])
    drawn = all(domain.path in DRAWN for domain in read)
    return "apache-2.0" if drawn and cfg.model.pretrained is None else ""


def _host(folder: Path, cfg: RunConfig, start: str) -> str:
    heads = {
        "daformer": "DAFormer head",
        "all_mlp": "SegFormer's all-MLP head",
        "linear": "linear head",
        "deeplabv2": "DeepLab-V2 head",
    }
    name = cfg.model.size
    if name == "auto":
        built = _read_json(folder / "student" / "config.json")
        name = (built.get("backbone_config") or built)["model_type"]
    sizes = f" reduced to depths {list(cfg.model.depths)}" if cfg.model.depths else ""
    if cfg.model.hidden_sizes:
        sizes += f"{' and' if sizes else ' with'} widths {list(cfg.model.hidden_sizes)}"
    weights = cfg.model.pretrained if not cfg.model.random_start else None
    brought = licence_of(weights or "")
    start = start or (f"`{weights}`" if weights else "random weights") + (f" ({brought})" if brought else "")
    extras = ", two resolutions (HRDA)" if cfg.hrda.enabled else ""
    extras += ", trained with hidden patches (MIC)" if cfg.loss_weights.masked_consistency else ""
    return f"`{name}` encoder{sizes}, {heads[cfg.model.head]}{extras}; the encoder starts from {start}"


def _scores(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("miou", "pixel_accuracy", "mean_accuracy", "iou")}


def _summary(folder: Path) -> dict[str, Any]:
    path = folder.parent / "summary.json"
    return _read_json(path) if path.is_file() else {}


def _eval_result(name: str, kind: str, value: float, test: Mapping[str, str]) -> EvalResult:
    return EvalResult(
        task_type="image-segmentation",
        task_name="Semantic segmentation",
        dataset_type=test["id"] or test["name"],
        dataset_name=test["name"],
        dataset_split=test["split"],
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 2),
    )


def _count_parameters(folder: Path) -> int:
    """Numbers in the safetensors files, the buffers of norms left out."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                    total += torch.Size(tensors.get_slice(name).get_shape()).numel()
    if not total:
        raise ValueError(f"{folder} holds no weights (model.safetensors).")
    return total


def _commit() -> str:
    """The commit that the code comes from; the released version where it is no work tree."""
    import t2sda_hf

    git = shutil.which("git")
    if git is not None and (PACKAGE.parent / ".git").exists():
        head = subprocess.run([git, "rev-parse", "HEAD"], cwd=PACKAGE, capture_output=True, text=True)
        changed = subprocess.run([git, "status", "--porcelain", "-uno"], cwd=PACKAGE, capture_output=True, text=True)
        if head.returncode == 0:
            return head.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")
    return f"t2sda_hf {t2sda_hf.__version__}"


def _hardware(num_processes: int) -> str:
    if torch.cuda.is_available():
        return f"{num_processes} x {torch.cuda.get_device_name()}"
    return f"CPU: {cpu_name()}, {torch.get_num_threads()} thread(s), {num_processes} process(es)"


def _template() -> Path:
    """model_cards/template.md.jinja; the wheel carries it beside this file."""
    beside = Path(__file__).with_name("template.md.jinja")
    return beside if beside.is_file() else PACKAGE.parent / "model_cards" / "template.md.jinja"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the run is not finished, or this is not its folder.")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(_existing(path).read_text(encoding="utf-8")))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is not JSON: {error}. Make it again with `t2sda train ... --resume auto`.") from error

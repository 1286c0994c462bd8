"""Adapt a segmentation model to an unlabelled target domain.

    t2sda train --config demo                                       run a recipe: --list names all recipes
    t2sda train --config mine.yaml --seed 1 --optim.lr 1e-4         every key of a config is also a flag: t2sda config
    t2sda train --config mine.yaml --dry-run                        test the run, estimate its time and memory
    t2sda train --config mine.yaml --resume auto                    start, continue, or report that all is done
    t2sda train --config mine.yaml --num_processes 4 --accelerate_config fsdp2
    t2sda train --config outputs/demo --continue_on streets-night   go on with a finished run on a further target

A recipe is a config file that comes with the package.

--dry-run makes two updates, saves and loads a checkpoint, and evaluates one image for everything that the run will do.
Then it prints how much memory and time the whole run needs on this machine. It deletes all that it has written, except
the label statistics that `datasets` caches.

--overfit-batch (the key train.overfit_batch) learns one batch again and again. If the losses do not fall, there is a
fault.

--resume auto continues the run in output_dir. If there is no such run, it starts one. So you can use the same command
for every start.

--continue_on starts from the finished student, and adapts to the old targets and to the further one. That is a path, or
the keys of a domain ("{path: photos, resize: [360, 480]}"). --replay is the share of the old ones. The further target
is read and tested as the old one is, at its own path; --target and --test say it otherwise. The run lies beside the
old one, in a folder whose name ends in _continued.

In a checkout of the repository, `accelerate launch scripts/train_uda.py --config ...` does the same.

Exit codes. With every code except 0 the command prints one line that says why:
    0     the run is finished
    1     another error has ended the run
    2     the input is wrong
    130   the run was stopped by SIGINT (Ctrl-C), and has written a checkpoint
    143   the run was stopped by SIGTERM, 129 by SIGHUP, 138 by SIGUSR1, and has written a checkpoint
"""

import logging
import os
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs
from accelerate.utils.environment import parse_flag_from_env

from ..config import RunConfig, dump_config
from ..data.domains import read_domain
from ..data.transforms import InputSize
from ..errors import DamagedCheckpoint, Ended, LostContact, LostFolder, RunFailed
from ..evaluation.gain import gain_interval
from ..evaluation.inference import to_pixel_values
from ..evaluation.page import NARROW_PANEL, write_page
from ..evaluation.report import save_panel
from ..evaluation.run_folder import write_data_record
from ..evaluation.table import difference, format_domains, format_table, number
from ..hub.card import record_run
from ..hub.push import check_push, push_after_training
from ..masking import MaskFilter, mask_known
from ..models import T2SDAForSemanticSegmentation
from ..storage import read_json, read_lines, write_json
from ..training.build import (
    Domains,
    accelerator_of,
    build_student,
    contents_of_run,
    data_record,
    open_domains,
    records,
    run_method,
    settle,
    start_student,
)
from ..training.checkpoint import checkpoints, left_in
from ..training.derive import Derived, rate_is_too_low
from ..training.distributed import decided_by_main, done_by_main, lost_contact, shards
from ..training.dry_run import rehearse
from ..training.estimate import refuse_too_large
from ..training.resume import Claim, Start, check_agreement, check_folder, config_of, lock_run, plan
from ..training.stopping import StopRequest
from ..training.store import unasked

logger = logging.getLogger(__name__)

UNSURE = 0.01  # weight of the pseudo-labels below which they count as none
Results = dict[str, dict[str, dict[str, Any]]]  # method -> "student", "teacher", "selected" -> result of an evaluation


def run(args: Namespace) -> int:
    """Build what the config names, then rehearse or train. Faults of the input show before anything is written."""
    if not args.config and not args.cfg.sources[0].path:
        raise ValueError("there is nothing to train: give --config with a file or a recipe; --list names the recipes.")
    if args.cfg.train.num_threads is not None:
        torch.set_num_threads(args.cfg.train.num_threads)
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=args.cfg.train.timeout_seconds))
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        patience.backend = "cuda:nccl,cpu:gloo"  # what processes say to each other waits for no GPU
    accelerator, cfg = accelerator_of(args.cfg, patience)
    log_to_stderr(logging.INFO if accelerator.is_main_process else logging.ERROR)
    derived, domains, initial = prepare(cfg, accelerator, rehearsal=args.dry_run)
    cfg = derived.cfg
    for line in derived.said:
        logging.info(line)
    for line in derived.warnings if accelerator.is_main_process else ():
        logging.warning("warning: %s.", line)
    contents = contents_of_run(cfg, domains, initial)
    described = records(cfg, domains, contents, accelerator)
    check_agreement(cfg, described, contents, accelerator)
    if args.dry_run:
        with StopRequest() as stop:
            said = rehearse(cfg, initial, domains, accelerator, described, stop)
        if accelerator.is_main_process:
            print(f"{mask_known(dump_config(cfg))}\n{said}")
            try:
                check_folder(cfg)
            except ValueError as error:
                print(f"but the run itself would be refused now: {error}")
        accelerator.end_training()
        return 0
    with ExitStack() as held:
        claims: list[Claim] = []  # of the main process
        decided_by_main(lambda: hold(held, lock_run(cfg), claims), accelerator, ValueError)
        starts = plan(cfg, described, accelerator, contents)
        with explained(accelerator, Path(cfg.output_dir)):
            if accelerator.is_main_process:
                record_run(Path(cfg.output_dir), command_of(args, accelerator), accelerator.num_processes)
            with StopRequest() as stop:
                owned = claims[0].check if claims else unasked
                results = train_all(derived, domains, initial, accelerator, described, starts, stop, owned)
            accelerator.end_training()
            if accelerator.is_main_process:
                owned()
                finish(cfg, domains, results)
                if pushed := push_after_training(cfg):
                    print(pushed)
    return 0


def hold(held: ExitStack, claim: Claim, claims: list[Claim]) -> None:
    """Keep the claim of a folder until the stack is left."""
    held.callback(claim.lock.release)
    claims.append(claim)


def log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(MaskFilter())
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def command_of(args: Namespace, accelerator: Accelerator) -> str:
    """The command line that repeats the run."""
    started = os.environ.get("T2SDA_COMMAND")  # by `launching`, whose flags do not reach this process
    if started:
        return started
    several = accelerator.num_processes > 1
    launcher = "accelerate launch" + (f" --multi_gpu --num_processes {accelerator.num_processes}" if several else "")
    if args.door != "t2sda":
        return f"{launcher} {args.door} {shlex.join(args.words)}"
    return (
        f"{launcher} -m t2sda_hf train {shlex.join(args.words)}" if several else f"t2sda train {shlex.join(args.words)}"
    )


@contextmanager
def explained(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Say of an error what it means for the run in `folder`; what shows only now is no fault of the input."""
    try:
        yield
    except (DamagedCheckpoint, LostFolder):  # nothing was begun; nothing there is ours
        raise
    except Ended as error:
        error.args = (f"{error} {left_in(folder)}",)
        raise
    except ValueError as error:
        raise RunFailed(f"in the middle of the run: {error} {left_in(folder)}") from error
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        text = str(error).rstrip(".")
        raise RunFailed(f"{type(error).__name__}: {text}. {left_in(folder)}") from error
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not lost_contact(error):
            raise
        raise LostContact(
            f"process {accelerator.process_index} lost contact with another one ({str(error).splitlines()[0]}). "
            f"{left_in(folder)}"
        ) from error


def prepare(
    cfg: RunConfig, accelerator: Accelerator, rehearsal: bool = False
) -> tuple[Derived, Domains, T2SDAForSemanticSegmentation]:
    """The config with all its values, the domains and the student to start from.

    Every fault of the input shows here; nothing is written. A rehearsal does not write into output_dir later either.
    """
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision {accelerator.mixed_precision!r} needs loss scaling, which one backward per term does not "
            "have. Use bf16 or no."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate was given gradient_accumulation_steps {accelerator.gradient_accumulation_steps}; "
            "leave it at 1 and set train.micro_batches instead."
        )
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
    if accelerator.distributed_type not in known:
        raise ValueError(
            f"accelerate was started with {accelerator.distributed_type.value}, which would do nothing here. Launch "
            "one process, several with whole networks, or FSDP2: see --accelerate_config in `t2sda train --help`."
        )
    if shards(accelerator) and (cfg.from_finished or cfg.method == "distil"):
        raise ValueError(
            f"method {cfg.method} with a start_model is not built for sharded networks. Launch whole ones."
        )
    if shards(accelerator) and cfg.train.compile != "none":
        raise ValueError(f"train.compile {cfg.train.compile!r} is not built for sharded networks. Set it to none.")
    if cfg.train.compile == "cuda_graphs" and accelerator.device.type != "cuda":
        raise ValueError(
            f"train.compile cuda_graphs needs a GPU, and this run is on a {accelerator.device.type}. Set it to "
            "inductor."
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            f"accelerate was given dynamo_backend {accelerator.state.dynamo_plugin.backend.value}, which would compile "
            "the evaluation too, and rename what is saved. Leave it at no and set train.compile instead."
        )
    decided_by_main(lambda: check_push(cfg), accelerator, ValueError)
    if not rehearsal:
        check_folder(cfg)
    accelerator.wait_for_everyone()  # nobody creates it before everybody looked
    refuse_too_large(cfg, accelerator.device)
    student = build_student(cfg)  # before the data: it is looked at faster
    domains = open_domains(cfg, accelerator)
    derived = settle(cfg, domains.facts, accelerator)
    if cfg.hrda.enabled and derived.cfg.hrda != cfg.hrda:
        student = build_student(derived.cfg)
    return derived, domains, student


def train_all(
    derived: Derived,
    domains: Domains,
    initial: T2SDAForSemanticSegmentation,
    accelerator: Accelerator,
    described: dict[str, dict[str, Any]],
    starts: dict[str, Start],
    stop: StopRequest,
    owned: Callable[[], None],
) -> Results:
    """Train the baseline, if there is one, and the method; what each evaluated at the end. Collective.

    `owned` raises LostFolder if the folder of the run is not its own any more.
    """
    cfg = derived.cfg
    folder, began = Path(cfg.output_dir), time.perf_counter()
    if accelerator.is_main_process:
        for method in starts:  # first: by these a folder is known as one to go on in, however early the run ends
            (folder / method).mkdir(exist_ok=True)
        told = [f"{line[:1].upper()}{line[1:]}." for line in (*derived.warnings, *derived.said)]
        record = data_record(cfg, domains, described)
        write_data_record(folder, **record, derived=told, derived_values=derived.values)

    def evaluated(method: str, start: Start, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        stop.check()
        own = config_of(cfg, method), initial, domains, accelerator, folder / method
        return run_method(*own, start=start, record=record, stop=stop, owned=owned)

    results = {method: evaluated(method, start, described[method]) for method, start in starts.items()}
    now = done_by_main(lambda: read_domain(domains.test, cfg.classes).contents.fingerprint, accelerator, ValueError)
    if now != domains.contents["test_data"].fingerprint:
        logger.warning("the test images or labels were changed in the middle of the run: all models are scored again.")
        for method in starts:
            start = Start(checkpoints(folder / method)[-1] if accelerator.is_main_process else folder)
            scored = described[method]["scored"] | {"test_data": now}
            results[method] = evaluated(method, start, described[method] | {"scored": scored})
    if accelerator.is_main_process:
        owned()
        summary: dict[str, Any] = {
            "seed": cfg.seed,
            "num_processes": accelerator.num_processes,
            "seconds": round(time.perf_counter() - began, 1),  # of the last start, if some of these were resumed
            "resumed": [method for method, start in starts.items() if start.checkpoint],
            "classes": cfg.classes,
            "test_data": now,
        }
        write_json(folder / "summary.json", summary | summarise(cfg, results) | judge(cfg, results))
    return results


def summarise(cfg: RunConfig, results: Results) -> dict[str, Any]:
    """method -> miou and iou of the student, teacher_miou ... of the others; the gain over the baseline."""
    summary: dict[str, Any] = {}
    for method, evaluated in results.items():
        entry = summary.setdefault(method, {})
        for which, result in shown(evaluated).items():
            prefix = "" if which == "student" else f"{which}_"
            entry |= {f"{prefix}miou": result["miou"], f"{prefix}iou": [result["iou"][name] for name in cfg.classes]}
    if cfg.baseline != "none":
        summary["gain"] = difference(summary[cfg.method]["miou"], summary[cfg.baseline]["miou"])
    return summary


def judge(cfg: RunConfig, results: Results) -> dict[str, Any]:
    """The 95 % interval of the gain, None where it cannot be told, and notes: sentences for whoever reads the gain."""
    notes, judged = [], dict[str, Any]()
    if cfg.baseline != "none":
        own, before = results[cfg.method]["student"], results[cfg.baseline]["student"]
        gain, interval = difference(own["miou"], before["miou"]), gain_interval(own, before)
        judged["gain_interval"] = interval
        if gain is not None and interval is not None and interval[0] <= 0 <= interval[1]:
            notes.append(
                f"The difference of {gain:+.2f} mIoU is within the noise of its {own['num_images']} test images (95 %: "
                f"{interval[0]:+.1f} to {interval[1]:+.1f})."
            )
        elif gain is not None and interval is None and {"groups", "domains"} & own.keys():  # earlier releases kept none
            notes.append(
                f"Whether the difference of {gain:+.2f} mIoU is more than noise cannot be told from "
                f"{own['num_images']} test images."
            )
    if (too_low := rate_is_too_low(cfg)) != "":
        notes.append(f"{too_low[:1].upper()}{too_low[1:]}.")
    logged = read_lines(Path(cfg.output_dir) / cfg.method / "scalars.jsonl")
    reached = max((entry["step"] for entry in logged), default=cfg.train.max_steps)
    if cfg.train.stop_after_falls and reached < cfg.train.max_steps:
        notes.append(
            f"Stopped after {reached} of {cfg.train.max_steps} updates, because {cfg.select} had fallen in "
            f"{cfg.train.stop_after_falls} evaluations in a row, as it does when predictions collapse. The best "
            f"weights by it are in {cfg.method}/selected, the last ones in {cfg.method}/student."
        )
    trust = [entry["trust"] for entry in logged if "trust" in entry]
    if trust and max(trust) < UNSURE:
        notes.append(
            f"The teacher was never sure: at most {max(trust):.1%} of the target pixels reached uda.pseudo_threshold "
            f"{cfg.uda.pseudo_threshold:g}, so hardly anything was learned from the target. Train longer, or lower it."
        )
    return judged | {"notes": notes}


def shown(evaluated: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results on the test domain, in the order of the table."""
    return {which: evaluated[which] for which in ("student", "teacher", "selected", "start") if which in evaluated}


def finish(cfg: RunConfig, domains: Domains, results: Results) -> None:
    """Draw the picture and the page of a run that is done, and print its table."""
    folder = Path(cfg.output_dir)
    # Loaded from the folders just written: what the picture shows is what others will load.
    models = {name: T2SDAForSemanticSegmentation.from_pretrained(folder / name / "student").eval() for name in results}
    picture = domains.test, models, domains.test.input_size, cfg.classes
    save_panel(folder / "panel.png", *picture, narrow=folder / NARROW_PANEL, **cfg.evaluation.windows)
    if cfg.push_to_hub.picture == "predictions":
        save_panel(folder / "predictions.png", *picture, predictions_only=True, **cfg.evaluation.windows)
    columns = {
        method if which == "student" else f"{method} ({which})": result
        for method, evaluated in results.items()
        for which, result in shown(evaluated).items()
    }
    own, judged = results[cfg.method], read_json(folder / "summary.json")
    print(f"\nIoU on {domains.test.name}, {own['student']['num_images']} images, in %\n{format_table(columns)}")
    if len(domains.test.parts) > 1:
        print(f"\nEvery IoU is the mean over the test domains.\n{format_domains(columns)}")
    if cfg.baseline != "none":
        gain = difference(own["student"]["miou"], results[cfg.baseline]["student"]["miou"])
        print(f"\n{cfg.method}{_verdict(gain, judged)} {cfg.baseline} (seed {cfg.seed}).")
    for note in judged["notes"]:
        print(note)
    if cfg.method == "distil":
        image = domains.test.image(0)
        for title, model in (("student", models[cfg.method]), ("start", start_student(cfg).eval())):
            print(f"{title}: {size_and_speed(model, image, domains.test.input_size())}")
    if "selected" in own:
        kept = own["selected"]
        print(f"Selected without target labels by {kept['proxy']}: the student after {kept['step']} updates.")
    print(f"Figures in {folder / 'summary.json'}, everything on one page: {write_page(folder)}")


def size_and_speed(model: T2SDAForSemanticSegmentation, image: np.ndarray, size: InputSize) -> str:
    """Parameters that segment, and the time of the middle one of five forwards on the CPU, in words."""
    numbers = sum(parameter.numel() for name, parameter in model.named_parameters() if "projector" not in name)
    pixels, seconds = to_pixel_values(image, size, model.device), []
    with torch.no_grad():
        for _ in range(5):
            began = time.perf_counter()
            model(pixels)
            seconds.append(time.perf_counter() - began)
    height, width = pixels.shape[-2:]
    median = 1000 * sorted(seconds)[2]
    return f"{numbers / 1e6:.2f} million parameters, {median:.1f} ms for an image of {width}x{height} on the CPU"


def _verdict(gain: float | None, judged: dict[str, Any]) -> str:
    """The words between method and baseline; a gain is only called one where nothing speaks against it."""
    said, interval = number(gain, "+.2f"), judged["gain_interval"]
    range_ = f" (95 % over test images: {interval[0]:+.1f} to {interval[1]:+.1f})" if interval else ""
    if gain is None or judged["notes"]:
        return f" differs by {said} mIoU{range_} from"
    if gain < 0:
        return f" loses {number(-gain, '.2f')} mIoU{range_} against"
    return f" gains {said} mIoU{range_} over"

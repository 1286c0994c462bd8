"""Adapt a segmentation model to an unlabelled domain.

    accelerate launch scripts/train_uda.py --config configs/demo.yaml [--seed 1] [--output_dir DIR] [--a.key value]
                                           [--resume auto|CHECKPOINT] [--allow_changes "[key, ...]"]
                                           [--dry-run] [--overfit-batch]

Every key of the config can be given on the command line; t2sda_hf/config.py lists them with the paper's defaults.
--dry-run makes two updates, a checkpoint and an evaluated image of everything the run will do, says what memory and
time the run takes on this machine, and leaves nothing behind but the label statistics that `datasets` caches.
--overfit-batch (train.overfit_batch) learns one batch over and over: losses that do not fall then mean a fault.
--resume auto goes on where the run in output_dir stopped, or starts it: the same command serves every start.
Exit code 0; 2 when the input is at fault; 143 or 130 after SIGTERM or SIGINT, with a checkpoint; 1 for what else ends
a run. Each with one line that says why.
"""

import json
import logging
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs
from filelock import FileLock

from t2sda_hf import T2SDAForSemanticSegmentation, load_config
from t2sda_hf.config import RunConfig, dump_config
from t2sda_hf.evaluation.page import write_page
from t2sda_hf.evaluation.report import save_panel
from t2sda_hf.evaluation.run_folder import write_data_record
from t2sda_hf.evaluation.table import format_table
from t2sda_hf.hub.card import record_run
from t2sda_hf.hub.push import check_push, push_after_training
from t2sda_hf.masking import MaskFilter, mask, run_masked
from t2sda_hf.training.build import (
    Domains,
    build_student,
    data_record,
    make_accelerator,
    open_domains,
    records,
    run_method,
)
from t2sda_hf.training.checkpoint import CheckpointError, DamagedCheckpoint, write_text
from t2sda_hf.training.distributed import decided_by_main, lost_contact, shards
from t2sda_hf.training.dry_run import rehearse
from t2sda_hf.training.resume import Start, check_folder, config_of, lock_run, plan
from t2sda_hf.training.stopping import Stopped, StopRequest


def main(arguments: list[str]) -> int:
    """The exit code, see above."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    given = arguments
    locks: list[FileLock] = []
    try:
        path = None
        if "--config" in arguments:
            at = arguments.index("--config")
            path, arguments = (arguments[at + 1 : at + 2] or [""])[0], arguments[:at] + arguments[at + 2 :]
        dry_run = "--dry-run" in arguments
        arguments = [argument for argument in arguments if argument != "--dry-run"]
        arguments = [
            "--train.overfit_batch=true" if argument == "--overfit-batch" else argument for argument in arguments
        ]
        cfg = load_config(path, arguments)
        if cfg.train.num_threads is not None:
            torch.set_num_threads(cfg.train.num_threads)
        patience = InitProcessGroupKwargs(timeout=timedelta(seconds=cfg.train.timeout_seconds))
        accelerator, cfg = make_accelerator(cfg, patience)
        log_to_stderr(logging.INFO if accelerator.is_main_process else logging.ERROR)
        domains, initial = prepare(cfg, accelerator)
        described = records(cfg, domains, accelerator)
        if dry_run:
            with StopRequest() as stop:
                said = rehearse(cfg, initial, domains, accelerator, described, stop)
            if accelerator.is_main_process:
                print(f"{mask(dump_config(cfg))}\n{said}")
            accelerator.end_training()
            return 0
        decided_by_main(lambda: locks.append(lock_run(cfg)), accelerator, ValueError)
        starts = plan(cfg, described, accelerator)
    except ValueError as error:
        for lock in locks:
            lock.release()
        return end(2, f"ValueError: {error}")
    except Stopped as error:  # of a dry run
        return end(error.exit_code, f"Stopped: {error}")
    try:
        with StopRequest() as stop:
            if accelerator.is_main_process:
                record_run(Path(cfg.output_dir), "scripts/train_uda.py", given, accelerator.num_processes)
            run_all(cfg, domains, initial, accelerator, described, starts, stop)
        accelerator.end_training()
        if accelerator.is_main_process and (said := push_after_training(cfg)):
            print(said)
    except (Stopped, DamagedCheckpoint, CheckpointError, FloatingPointError) as error:  # the same on every process
        code = error.exit_code if isinstance(error, Stopped) else 2 if isinstance(error, DamagedCheckpoint) else 1
        return end(code, f"{type(error).__name__}: {error}" if accelerator.is_main_process else "")
    except OSError as error:
        return end(1, f"{type(error).__name__}: {error}. Checkpoints are intact; go on with --resume auto.")
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not lost_contact(error):
            raise
        said = str(error).splitlines()[0]
        return end(
            1,
            f"RuntimeError: process {accelerator.process_index} lost contact with another one ({said}). "
            "Checkpoints are intact; start all again with --resume auto.",
        )
    finally:
        for lock in locks:
            lock.release()
    return 0


def log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(MaskFilter())
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def end(code: int, text: str) -> int:
    """Say one line, and hand back the exit code."""
    if text:
        print(mask(text), file=sys.stderr)
    return code


def prepare(cfg: RunConfig, accelerator: Accelerator) -> tuple[Domains, T2SDAForSemanticSegmentation]:
    """The domains and the student to start from. Every fault of the input shows here; nothing is written."""
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
            "as configs/accelerate/ does: one process, several with whole networks, or FSDP2."
        )
    if shards(accelerator) and cfg.train.compile != "none":
        raise ValueError(f"train.compile {cfg.train.compile!r} is not built for sharded networks. Set it to none.")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            f"accelerate was given dynamo_backend {accelerator.state.dynamo_plugin.backend.value}, which would compile "
            "the evaluation too, and rename what is saved. Leave it at no and set train.compile instead."
        )
    decided_by_main(lambda: check_push(cfg), accelerator, ValueError)
    check_folder(cfg)
    accelerator.wait_for_everyone()  # nobody creates it before everybody looked
    student = build_student(cfg)  # before the data: it is looked at faster
    return open_domains(cfg, accelerator), student


def run_all(
    cfg: RunConfig,
    domains: Domains,
    initial: T2SDAForSemanticSegmentation,
    accelerator: Accelerator,
    described: dict[str, dict[str, Any]],
    starts: dict[str, Start],
    stop: StopRequest,
) -> None:
    """Train the baseline, if there is one, and the method; write summary.json and panel.png, print the table."""
    folder = Path(cfg.output_dir)
    started = time.perf_counter()
    columns: dict[str, dict[str, Any]] = {}
    if accelerator.is_main_process:
        for method in starts:  # first: by these a folder is known as one to go on in, however early the run ends
            (folder / method).mkdir(exist_ok=True)
        write_data_record(folder, **data_record(cfg, domains, described))
    for method, start in starts.items():
        stop.check()
        run_cfg, record = config_of(cfg, method), described[method]
        results = run_method(
            run_cfg, initial, domains, accelerator, folder / method, start=start, record=record, stop=stop
        )
        columns[method] = results["student"]
        if "teacher" in results:
            columns[f"{method} (teacher)"] = results["teacher"]
        if "selected" in results:
            columns[f"{method} (selected)"] = results["selected"]
    if not accelerator.is_main_process:
        return
    summary: dict[str, Any] = {
        "seed": cfg.seed,
        "num_processes": accelerator.num_processes,
        "seconds": round(time.perf_counter() - started, 1),
        "resumed": [
            method for method, start in starts.items() if start.checkpoint
        ],  # then seconds are the last start's
        "classes": cfg.classes,
    }
    for name, result in columns.items():
        method, _, which = name.partition(" (")
        entry = summary.setdefault(method, {})
        prefix = f"{which[:-1]}_" if which else ""
        entry |= {f"{prefix}miou": result["miou"], f"{prefix}iou": [result["iou"][c] for c in cfg.classes]}
    if cfg.baseline != "none":
        summary["gain"] = columns[cfg.method]["miou"] - columns[cfg.baseline]["miou"]
    write_text(folder / "summary.json", json.dumps(summary, indent=2))
    students = [name for name in columns if not name.endswith(")")]
    # Loaded from the folders just written: what the picture shows is what others will load.
    models = {name: T2SDAForSemanticSegmentation.from_pretrained(folder / name / "student").eval() for name in students}
    shown = domains.test, models, domains.test.network_size(), cfg.classes
    save_panel(folder / "panel.png", *shown)
    if cfg.push_to_hub.picture == "predictions":
        save_panel(folder / "predictions.png", *shown, 4, True)
    print(f"\nIoU on {domains.test.name}, {columns[cfg.method]['num_images']} images, in %\n{format_table(columns)}")
    if "gain" in summary:
        print(f"\n{cfg.method} gains {summary['gain']:+.2f} mIoU over {cfg.baseline} (seed {cfg.seed}).")
    if f"{cfg.method} (selected)" in columns:
        kept = columns[f"{cfg.method} (selected)"]
        print(f"Selected without target labels by {kept['proxy']}: the student after {kept['step']} updates.")
    print(f"Figures in {folder / 'summary.json'}, everything on one page: {write_page(folder)}")


if __name__ == "__main__":
    sys.exit(run_masked(lambda: main(sys.argv[1:])))

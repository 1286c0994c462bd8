"""Adapt a segmentation model to an unlabelled domain.

    accelerate launch scripts/train_uda.py --config configs/demo.yaml [--seed 1] [--output_dir DIR] [--a.key value]

Every key of the config can be given on the command line; t2sda_hf/config.py lists them with the paper's defaults.
"""

import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from t2sda_hf import T2SDAForSemanticSegmentation, load_config
from t2sda_hf.config import RunConfig
from t2sda_hf.evaluation.evaluator import format_table
from t2sda_hf.evaluation.report import save_panel
from t2sda_hf.training.build import Domains, build_student, open_domains, run_method


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 with one line when the input is at fault."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        path = None
        if "--config" in arguments:
            at = arguments.index("--config")
            path, arguments = (arguments[at + 1 : at + 2] or [""])[0], arguments[:at] + arguments[at + 2 :]
        cfg = load_config(path, arguments)
        if cfg.train.num_threads is not None:
            torch.set_num_threads(cfg.train.num_threads)
        accelerator = Accelerator(log_with=list(cfg.train.log_with) or None, project_dir=cfg.output_dir)
        logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        transformers.utils.logging.disable_progress_bar()
        domains, initial = prepare(cfg, accelerator)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    run_all(cfg, domains, initial, accelerator)
    accelerator.end_training()
    return 0


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
    folder = Path(cfg.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir {cfg.output_dir!r} exists and is not empty. Nothing is overwritten: "
            "pass another --output_dir, or remove the folder yourself."
        )
    accelerator.wait_for_everyone()  # nobody creates it before everybody looked
    student = build_student(cfg)  # before the data: it is looked at faster
    return open_domains(cfg, accelerator), student


def run_all(cfg: RunConfig, domains: Domains, initial: T2SDAForSemanticSegmentation, accelerator: Accelerator) -> None:
    """Train the baseline, if there is one, and the method; write summary.json and panel.png, print the table."""
    folder = Path(cfg.output_dir)
    started = time.perf_counter()
    columns: dict[str, dict[str, Any]] = {}
    for method in [cfg.baseline] * (cfg.baseline != "none") + [cfg.method]:
        run_cfg = replace(cfg, method=method, baseline="none")
        results = run_method(run_cfg, initial, domains, accelerator, folder / method)
        columns[method] = results["student"]
        if "teacher" in results:
            columns[f"{method} (teacher)"] = results["teacher"]
    if not accelerator.is_main_process:
        return
    summary: dict[str, Any] = {
        "seed": cfg.seed,
        "num_processes": accelerator.num_processes,
        "seconds": round(time.perf_counter() - started, 1),
        "classes": cfg.classes,
    }
    for name, result in columns.items():
        entry = summary.setdefault(name.removesuffix(" (teacher)"), {})
        prefix = "teacher_" if name.endswith(" (teacher)") else ""
        entry |= {f"{prefix}miou": result["miou"], f"{prefix}iou": [result["iou"][c] for c in cfg.classes]}
    if cfg.baseline != "none":
        summary["gain"] = columns[cfg.method]["miou"] - columns[cfg.baseline]["miou"]
    (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    students = [name for name in columns if not name.endswith(" (teacher)")]
    # Loaded from the folders just written: what the picture shows is what others will load.
    models = {name: T2SDAForSemanticSegmentation.from_pretrained(folder / name / "student").eval() for name in students}
    save_panel(folder / "panel.png", domains.test, models, domains.test.network_size(), cfg.classes)
    print(f"\nIoU on {domains.test.name}, {columns[cfg.method]['num_images']} images, in %\n{format_table(columns)}")
    if "gain" in summary:
        print(f"\n{cfg.method} gains {summary['gain']:+.2f} mIoU over {cfg.baseline} (seed {cfg.seed}).")
    print(f"Figures in {folder / 'summary.json'}, picture in {folder / 'panel.png'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

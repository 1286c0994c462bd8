"""Is it better, or was it luck? Train one or two configs with several seeds and compare them pair by pair.

python scripts/repeat.py configs/demo.yaml --seeds 0..4
python scripts/repeat.py a.yaml b.yaml --seeds 0..4 --output outputs/ab --train.max_steps 400

Every other option is handed to scripts/train_uda.py. Runs lie in OUTPUT/<config>/seed_N. Finished ones are not run
again, stopped ones go on: the same command serves every start. Prints mean, sd (sample) and n of every model, and the
paired difference with its 95% confidence interval. Exit code 1 if a run failed.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2sda_hf.analysis.statistics import paired_difference
from t2sda_hf.config import RunConfig, load_config
from t2sda_hf.evaluation.table import markdown, spread
from t2sda_hf.masking import run_masked
from t2sda_hf.training.resume import config_of

TRAIN = Path(__file__).with_name("train_uda.py")


def seeds_of(text: str) -> list[int]:
    """ "0..4" or "0,3,7" -> seeds."""
    try:
        if ".." in text:
            first, last = map(int, text.split(".."))
            found = list(range(first, last + 1))
        else:
            found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"--seeds takes a range like 0..4 or a list like 0,3,7 of different seeds, got {text!r}.")
    return found


def finished(folder: Path, cfg: RunConfig) -> dict[str, Any] | None:
    """The summary of a run that is done; None if it is not.

    Raises:
        ValueError: if it was done with another config.
    """
    summary = folder / "summary.json"
    if not summary.is_file():
        return None
    written = load_config(folder / cfg.method / "resolved_config.yaml")
    expected = config_of(cfg, cfg.method)
    if replace(written, output_dir="") != replace(expected, output_dir=""):
        raise ValueError(
            f"{folder} holds a finished run of another config. Give another --output, or remove the folder yourself."
        )
    return json.loads(summary.read_text(encoding="utf-8"))


def scores_of(summaries: dict[int, dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Model -> seed -> mIoU."""
    found: dict[str, dict[int, float]] = {}
    for seed, summary in summaries.items():
        for method, entry in summary.items():
            if isinstance(entry, dict) and "miou" in entry:
                found.setdefault(method, {})[seed] = entry["miou"]
                if "teacher_miou" in entry:
                    found.setdefault(f"{method} (teacher)", {})[seed] = entry["teacher_miou"]
    return found


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    seeds = seeds_of(args.seeds)
    names = [config.stem for config in args.configs]
    if len(set(names)) < len(names):
        raise ValueError(f"two configs are called {names[0]}: their runs would share a folder. Rename one.")
    planned = []
    for config, name in zip(args.configs, names, strict=True):
        for seed in seeds:
            folder = args.output / name / f"seed_{seed}"
            given = [*overrides, "--seed", str(seed), "--output_dir", str(folder)]
            planned.append((name, seed, folder, ["--config", str(config), *given], load_config(config, given)))
            finished(folder, planned[-1][-1])  # every mistake shows before the first run
    failed = []
    summaries: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    for name, seed, folder, arguments, cfg in planned:
        if finished(folder, cfg) is None:
            command = [*shlex.split(args.launch or sys.executable), str(TRAIN), *arguments, "--resume", "auto"]
            print(f"\n{name}, seed {seed}: {shlex.join(command)}", flush=True)
            code = subprocess.run(command, check=False).returncode
            if code in (130, 143, -2, -15):
                print("Stopped. The same command goes on.", file=sys.stderr)
                return code if code > 0 else 128 - code
            if code:
                failed.append(f"{name}, seed {seed} (exit code {code})")
        summary = finished(folder, cfg)
        if summary is not None:
            summaries[name][seed] = summary
    report(args.output, {name: scores_of(found) for name, found in summaries.items()}, planned)
    if failed:
        print(f"\nFailed and not in these figures: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def report(output: Path, scores: dict[str, dict[str, dict[int, float]]], planned: list[Any]) -> None:
    rows = []
    for name, models in scores.items():
        for model, by_seed in models.items():
            values = spread(list(by_seed.values()))
            sd = "-" if values["sd"] is None else f"{values['sd']:.2f}"
            rows.append([name, model, f"{values['mean']:.2f}", sd, str(values["n"])])
    if rows:
        print("\nmIoU in %\n\n" + markdown(["config", "model", "mean", "sd", "n"], rows))
    main = {name: cfg.method for name, _, _, _, cfg in planned}
    pairs: list[tuple[str, dict[int, float], dict[int, float]]] = []
    for name, models in scores.items():
        if "source_only" in models and main[name] != "source_only" and main[name] in models:
            pairs.append((f"{name}: {main[name]} over source_only", models[main[name]], models["source_only"]))
    if len(scores) == 2:
        (first, of_first), (second, of_second) = scores.items()
        both = of_second.get(main[second], {}), of_first.get(main[first], {})
        pairs.append((f"{second} over {first}", *both))
    found = {}
    for title, values, others in pairs:
        if len(values.keys() & others.keys()) > 1:
            found[title] = paired_difference(values, others)
            print(f"\n{title}: {found[title]}")
        else:
            print(f"\n{title}: fewer than two seeds in common, nothing to compare")
    output.mkdir(parents=True, exist_ok=True)
    content = {"miou": scores, "differences": {title: vars(difference) for title, difference in found.items()}}
    (output / "repeat.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\nFigures in {output / 'repeat.json'}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.yaml", help="one or two")
    parser.add_argument("--seeds", default="0..2", help="0..4 or 0,3,7")
    parser.add_argument("--output", type=Path, default=Path("outputs/repeat"), metavar="FOLDER")
    parser.add_argument("--launch", metavar="COMMAND", help='instead of python, e.g. "accelerate launch"')
    args, overrides = parser.parse_known_args(arguments)
    try:
        if len(args.configs) > 2:
            raise ValueError(f"two configs are compared at most, got {len(args.configs)}.")
        return run(args, overrides)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run_masked(main))

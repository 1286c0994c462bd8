"""Find out whether a difference is real or luck: train one or two configs with several seeds, and compare seed by seed.

    t2sda repeat demo --seeds 0..4
    t2sda repeat a.yaml b.yaml --seeds 0..4 --output outputs/ab --train.max_steps 400

Every key of a config is also a flag, and applies to all runs. The flags that start several processes are those of
`t2sda train`. A run is written to OUTPUT/<config>/seed_N. If you call the same command again, it skips finished runs
and continues stopped ones.

The command prints the mean, the sd (sample standard deviation) and the number n of runs for every model. For two models
it prints the mean of their differences, taken seed by seed, with a 95% confidence interval. It writes all of this to
OUTPUT/repeat.json. The exit code is 1 if a run failed.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..analysis.statistics import paired_difference
from ..config import RunConfig, changes, differences, flatten, load_config, plain_name
from ..evaluation.table import markdown, number, spread
from ..launching import Runner, refuse_keys, words_of
from ..storage import foreign_json, read_json, write_json
from ..training.derive import DERIVED

Scores = dict[str, dict[int, float]]  # model -> seed -> mIoU


@dataclass(frozen=True)
class Planned:
    """One run: the name of its config, its seed, where it lies, and the words of `t2sda train` that make it."""

    name: str
    seed: int
    folder: Path
    cfg: RunConfig
    words: tuple[str, ...]


def run(args: Namespace) -> int:
    planned = plan(args)
    missing = [one for one in planned if finished(one) is None]  # every mistake shows before the first run
    refuse_unlike(planned)
    failed = []
    with Runner() as runner:
        for one in missing:
            print(f"\n{one.name}, seed {one.seed}: {shlex.join(('t2sda', *one.words))}", flush=True)
            code = runner.t2sda(*one.words)
            if code == 2:
                raise ValueError("the run was refused, see above, and the others would be, too.")
            if code:
                failed.append(f"{one.name}, seed {one.seed} (exit code {code})")
    report(args.output, planned)
    if failed:
        print(f"\nFailed and not in these figures: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def plan(args: Namespace) -> list[Planned]:
    refuse_keys(args.overrides, seed="use --seeds", output_dir="use --output", resume="a run always goes on")
    figures = args.output / "repeat.json"
    if foreign_json(figures, {"miou"}):
        raise ValueError(f"{figures} exists, and `t2sda repeat` did not write it: pass another --output.")
    if len(args.configs) > 2:
        raise ValueError(f"two configs are compared at most, got {len(args.configs)}.")
    names = [Path(config).stem for config in args.configs]
    if len(set(names)) < len(names):  # recipes of two folders
        names = [plain_name(config) for config in args.configs]
    if len(set(names)) < len(names):
        raise ValueError(f"two configs are called {names[0]}: their runs would share a folder. Rename one.")
    planned = []
    for config, name, cfg in zip(args.configs, names, args.cfgs, strict=True):
        for seed in args.seeds:
            folder = args.output / name / f"seed_{seed}"
            own = replace(cfg, seed=seed, output_dir=str(folder))
            words = ("train", "--config", config, *args.overrides, f"--seed={seed}", f"--output_dir={folder}")
            planned.append(Planned(name, seed, folder, own, (*words, "--resume=auto", *words_of(args))))
    return planned


def finished(run: Planned) -> dict[str, Any] | None:
    """The summary of a run that is done; None if it is not.

    Raises:
        ValueError: if it was done with another config.
    """
    found: dict[str, Any] | None = read_json(run.folder / "summary.json")
    if not found:
        return None
    done = load_config(run.folder / run.cfg.method / "resolved_config.yaml", record=True)
    different = differences(asdict(done), asdict(run.cfg))
    # Where the data lies does not matter: training compares what is in it, and a finished run does not train.
    # What this config leaves open, the run has derived.
    other = [
        key
        for key, (_, now) in different.items()
        if changes(key) in ("learning", "scoring") and not (key in DERIVED and now is None)
    ]
    if other:
        raise ValueError(
            f"{run.folder} holds a finished run of another config, by {', '.join(other)}. Give another --output, or "
            "remove the folder yourself."
        )
    return found


def refuse_unlike(planned: Sequence[Planned]) -> None:
    """ValueError for finished runs of one config that have derived other values for what it leaves open."""
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for run in planned:
        if finished(run) is None:
            continue
        given = flatten(asdict(run.cfg))
        done = flatten(asdict(load_config(run.folder / run.cfg.method / "resolved_config.yaml", record=True)))
        learned = [key for key in DERIVED if key != "data.num_workers"]  # a matter of the machine
        derived = {key: done[key] for key in learned if given[key] is None and done[key] is not None}
        folder, before = first.setdefault(run.name, (run.folder, derived))
        if other := [key for key in before.keys() & derived.keys() if before[key] != derived[key]]:
            raise ValueError(
                f"{folder} and {run.folder} have worked out different values of {', '.join(sorted(other))}, so they "
                "are no seeds of one config: remove one of them yourself, or give the values in the config and another "
                "--output."
            )


def scores_of(summaries: dict[int, dict[str, Any]]) -> Scores:
    found: Scores = {}
    for seed, summary in summaries.items():
        for method, entry in summary.items():
            if isinstance(entry, dict) and entry.get("miou") is not None:
                found.setdefault(method, {})[seed] = entry["miou"]
                if entry.get("teacher_miou") is not None:
                    found.setdefault(f"{method} (teacher)", {})[seed] = entry["teacher_miou"]
    return found


def report(output: Path, planned: Sequence[Planned]) -> None:
    """Print the figures of the runs that are done, and write repeat.json."""
    refuse_unlike(planned)
    main = {one.name: one.cfg.method for one in planned}
    summaries: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in main}
    for one in planned:
        if (summary := finished(one)) is not None:
            summaries[one.name][one.seed] = summary
    scored_on: dict[str, str] = {}
    for name, runs in summaries.items():
        scored_on |= {run["test_data"]: f"{name}, seed {seed}" for seed, run in runs.items() if run.get("test_data")}
    if len(scored_on) > 1:
        raise ValueError(
            f"runs were scored on different test images or label maps: {' and '.join(scored_on.values())}. Their "
            "scores say nothing about each other. `t2sda train` with --resume auto scores a finished run again."
        )
    scores = {name: scores_of(found) for name, found in summaries.items()}
    rows = []
    for name, models in scores.items():
        for model, by_seed in models.items():
            found = spread(list(by_seed.values()))
            rows.append([name, model, number(found["mean"]), number(found["sd"]), str(found["n"])])
    if rows:
        print("\nmIoU in %\n\n" + markdown(["config", "model", "mean", "sd", "n"], rows))
    pairs: list[tuple[str, dict[int, float], dict[int, float]]] = []
    for name, models in scores.items():
        if "source_only" in models and main[name] != "source_only" and main[name] in models:
            pairs.append((f"{name}: {main[name]} over source_only", models[main[name]], models["source_only"]))
    if len(scores) == 2:
        (first, of_first), (second, of_second) = scores.items()
        both = of_second.get(main[second], {}), of_first.get(main[first], {})
        pairs.append((f"{second} over {first}", *both))
    compared = {}
    for title, values, others in pairs:
        if len(values.keys() & others.keys()) > 1:
            compared[title] = paired_difference(values, others)
            print(f"\n{title}: {compared[title]}")
        else:
            print(f"\n{title}: fewer than two seeds in common, nothing to compare")
    content = {"miou": scores, "differences": {title: vars(difference) for title, difference in compared.items()}}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "repeat.json", content)
    print(f"\nFigures in {output / 'repeat.json'}")

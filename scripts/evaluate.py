"""Score trained models on labelled domains: per-class IoU, mIoU, accuracies, confusion matrices, in %.

python scripts/evaluate.py outputs/run/t2sda/student --domain streets-target --output scores.json
python scripts/evaluate.py outputs/demo_0 outputs/demo_1 outputs/demo_2 --domain streets-target streets-source
accelerate launch scripts/evaluate.py mine=outputs/run/t2sda/student --domain data/city --label_space cityscapes_ids

A model is a folder or Hub id of a T2S-DA model or a SegFormer, or the folder of a run: then all it trained, and the
teacher of its newest checkpoint. TITLE=MODEL names its column; models of one title are seeds of one method and are
shown as mean ± sd (sample). Means over 16 and 13 classes (SYNTHIA's benchmarks) are shown when the model has the 19.
"""

import argparse
import copy
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import load_domain
from t2sda_hf.evaluation.evaluator import LabelledDomain, Part, evaluate_model
from t2sda_hf.evaluation.inference import load_model, saved_image_size
from t2sda_hf.evaluation.models import titled
from t2sda_hf.evaluation.table import class_sets_of, format_table, summarise
from t2sda_hf.labels import LABEL_SPACES
from t2sda_hf.masking import run_masked
from t2sda_hf.models import T2SDAForSemanticSegmentation
from t2sda_hf.teacher import with_statistics_of
from t2sda_hf.training.checkpoint import checkpoints

Loaded = tuple[T2SDAForSemanticSegmentation, tuple[str, ...]]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("models", nargs="+", metavar="[TITLE=]MODEL", help="see above")
    parser.add_argument(
        "--domain", nargs="+", required=True, help="names of domains, parquet files, folders, data sets"
    )
    parser.add_argument("--split", default="validation")
    parser.add_argument("--layout", default="", help="--domain is the root of an official download of this name")
    parser.add_argument("--label_space", default="cityscapes", help=f"what ids mean: {', '.join(LABEL_SPACES)}")
    parser.add_argument("--class_names", nargs="+", default=[], help="or the names themselves, in the order of the ids")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th image")
    parser.add_argument("--subset", nargs="+", default=[], metavar="NAME=CLASS,CLASS", help="also the mIoU over these")
    parser.add_argument("--mode", choices=("whole", "slide"), default="whole")
    parser.add_argument("--window", **size, help="for --mode slide")
    parser.add_argument("--stride", **size, help="for --mode slide")
    parser.add_argument("--image_size", **size, help="network input; default: what is saved with MODEL")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="scores and matrices; a .csv of the table too")
    return parser.parse_args(arguments)


def models_of(given: str) -> dict[str, tuple[str, Callable[[], Loaded]]]:
    """Column title -> (folder or id, how to load it) of one argument; a run folder has several."""
    title, name = titled(given)
    if (Path(name) / "config.json").is_file() or not list(Path(name).glob("*/student/config.json")):
        return {title: (name, lambda: load_model(name))}
    found: dict[str, tuple[str, Callable[[], Loaded]]] = {}
    for student in sorted(Path(name).glob("*/student")):
        prefix = "" if title == name else f"{title} "
        found[f"{prefix}{student.parent.name}"] = str(student), lambda path=str(student): load_model(path)
        newest = checkpoints(student.parent)[-1:]
        if newest and student.parent.name != "source_only":
            found[f"{prefix}{student.parent.name} (teacher)"] = str(student), lambda path=newest[0]: load_teacher(path)
    return found


def load_teacher(checkpoint: Path) -> Loaded:
    """The teacher of a checkpoint with its student's running statistics: what the table of the run calls teacher."""
    student, classes = load_model(str(checkpoint / "student"))
    teacher, _ = load_model(str(checkpoint / "teacher"))
    return with_statistics_of(copy.deepcopy(teacher), student), classes


def subsets_of(given: Sequence[str], classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    asked = {}
    for item in given:
        title, equals, names = item.partition("=")
        if not equals:
            raise ValueError(f"--subset takes NAME=CLASS,CLASS, got {item!r}.")
        asked[title] = tuple(name.strip() for name in names.split(","))
        unknown = [name for name in asked[title] if name not in classes]
        if unknown:
            raise ValueError(f"--subset {title} names {', '.join(unknown)}; the model has {', '.join(classes)}.")
    return class_sets_of(classes) | asked


def run(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    if args.every < 1:
        raise ValueError(f"--every must be at least 1, got {args.every}.")
    models = [(title, *entry) for given in args.models for title, entry in models_of(given).items()]
    shown: dict[str, Any] = {}
    for path in args.domain:
        config = DomainConfig(
            path=path,
            split=args.split,
            layout=args.layout,
            label_space=args.label_space,
            class_names=tuple(args.class_names),
        )
        columns: dict[str, list[dict[str, Any]]] = {}
        subsets: dict[str, tuple[str, ...]] = {}
        for title, name, load in models:
            model, classes = load()
            subsets = subsets_of(args.subset, classes)
            try:
                domain = load_domain(config, classes)
            except ValueError as error:
                advice = " Without labels there is no score; scripts/analyze.py --no_labels says what can be said."
                raise ValueError(f"{error}{advice * ('has no column' in str(error))}") from error
            scored: LabelledDomain = domain
            if args.every > 1:
                scored = Part(domain, range(0, len(domain), args.every), f"{domain.name}, every {args.every}th image")
            image_size = tuple(args.image_size) if args.image_size else saved_image_size(name)
            result = evaluate_model(
                # Not wrapped: this is the device, and autocast in forward if the launcher asked for it.
                accelerator.prepare_model(model, evaluation_mode=True),
                scored,
                image_size=image_size,
                classes=classes,
                accelerator=accelerator,
                mode=args.mode,
                window=tuple(args.window) if args.window else None,
                stride=tuple(args.stride) if args.stride else None,
                limit=args.limit,
                skip_unreadable=True,
            )
            settings = {"model": name, "image_size": image_size, "mode": args.mode, "every": args.every}
            columns.setdefault(title, []).append(settings | {"window": args.window, "stride": args.stride} | result)
        if accelerator.is_main_process:
            show(path, columns, subsets)
            shown[path] = columns
    if accelerator.is_main_process and args.output:
        save(args.output, shown, subsets)
    accelerator.end_training()


def show(path: str, columns: dict[str, list[dict[str, Any]]], subsets: dict[str, tuple[str, ...]]) -> None:
    first = next(iter(columns.values()))[0]
    print(f"\n{first['domain']}, {first['num_images']} images, IoU in %\n\n{format_table(columns, subsets)}")
    if first["unreadable"]:
        print(f"\n{len(first['unreadable'])} images could not be read and are not in these figures:", file=sys.stderr)
        print("\n".join(first["unreadable"]), file=sys.stderr)
    unscored = [name for name, row in zip(first["iou"], first["confusion"], strict=True) if not sum(row)]
    if unscored:
        print(f"\nNo pixel of {path} is labelled {', '.join(unscored)}: 0 if predicted anywhere, otherwise left out.")


def save(output: Path, shown: dict[str, Any], subsets: dict[str, tuple[str, ...]]) -> None:
    """Everything as JSON: of one model on one domain its result, otherwise domain -> title -> results. And a CSV."""
    results = [result for columns in shown.values() for seeds in columns.values() for result in seeds]
    output.parent.mkdir(parents=True, exist_ok=True)
    content = results[0] if len(results) == 1 else shown
    output.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["domain", "model", "score", "mean", "sd", "sd_population", "n"])
        for path, columns in shown.items():
            for title, seeds in columns.items():
                for row, values in summarise(seeds, subsets).items():
                    writer.writerow([path, title, row, *values.values()])


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse_arguments(arguments))
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))

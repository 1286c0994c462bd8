"""Score trained models on labelled domains: IoU of each class, mIoU, accuracies and confusion matrices, in %.

    t2sda evaluate outputs/run/t2sda/student --config mine.yaml          the test domain of a config, as in training
    t2sda evaluate outputs/run --domain data/city --label_map "{human: person}" --output scores.json
    t2sda evaluate outputs/demo_0 outputs/demo_1 --domain streets-target streets-source
    t2sda evaluate mine=outputs/run/t2sda/student --config mine.yaml --num_processes 2

A model is a folder or the Hub id of a T2S-DA model or of a SegFormer. You can also give the folder of a run. Then all
models that the run trained are scored, and the teacher of its newest checkpoint. If you name no config, images are seen
in the windows of the run (evaluation.*). If you name no domain either, they are the test images of the run.

TITLE=MODEL sets the title of a model's column in the table. Models with the same title count as seeds of one method.
They are shown as mean ± sd (sample standard deviation). If a model has the 19 classes of Cityscapes, the table also
shows the means over 16 and 13 classes of SYNTHIA's benchmarks.
"""

import copy
import csv
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..config import SUPERVISED
from ..data.domains import domain_contents
from ..data.transforms import InputSize, KeepRatio
from ..device import make_accelerator
from ..evaluation.evaluator import LabelledDomain, Part, evaluate_model
from ..evaluation.inference import load_model, saved_image_size
from ..evaluation.models import students_of, titled
from ..evaluation.run_folder import SELECTED
from ..evaluation.table import class_sets_of, format_table, markdown, number, spread, summarise
from ..storage import outputs, refuse_foreign, write_json
from ..teacher import with_statistics_of
from ..training.build import networks_of
from ..training.checkpoint import WHOLE, checkpoints
from ..training.derive import loading_processes
from .domains import open_labelled, test_domains

Loaded = tuple[nn.Module, tuple[str, ...]]


def run(args: Namespace) -> int:
    if args.every < 1:
        raise ValueError(f"--every must be at least 1, got {args.every}.")
    domains = test_domains(args)
    how = args.cfg.evaluation  # not before: it may be that of the run
    files = () if args.output is None else (args.output, args.output.with_suffix(".csv"))
    if len(set(files)) < len(files):
        raise ValueError(f"--output {args.output} is the name of the table that is written beside it: end it in .json.")
    if folders := [file for file in files if file.is_dir()]:
        raise ValueError(f"--output {args.output} needs a name of a file, and {folders[0]} is a folder: give another.")
    read = [path for config in domains for path in (config.path, config.label_path)]
    refuse_foreign("evaluate", files, read)
    accelerator = make_accelerator(args.cfg.train.precision)
    workers = args.cfg.data.num_workers
    if workers is None:
        workers = loading_processes(len(os.sched_getaffinity(0)) // accelerator.num_processes)
    models = [(title, *entry) for given in args.models for title, entry in models_of(given).items()]
    shown: dict[str, Any] = {}
    titled_alike: dict[str, tuple[str, ...]] = {}
    names = [config.path for config in domains]
    names = [
        f"{path} ({one.split})" if names.count(path) > 1 else path for path, one in zip(names, domains, strict=True)
    ]
    advice = "Without labels there is no score; `t2sda analyze --no_labels` says what can be said."
    if len(domains) > 1:  # before the first is scored
        _, classes = models[0][2]()
        for config in domains:
            open_labelled(config, classes, advice)
    for config, called in zip(domains, names, strict=True):
        columns: dict[str, list[dict[str, Any]]] = {}
        subsets: dict[str, tuple[str, ...]] = {}
        for title, name, load in models:
            model, classes = load()
            if titled_alike.setdefault(title, classes) != classes:
                raise ValueError(
                    f"two models are called {title!r} and have different classes: {', '.join(titled_alike[title])}; "
                    f"{', '.join(classes)}. Only seeds of one method share a title: give them different ones."
                )
            subsets = subsets_of(args.subset, classes)
            domain = open_labelled(config, classes, advice)
            scored: LabelledDomain = domain
            if args.every > 1:
                scored = Part(domain, range(0, len(domain), args.every), f"{domain.name}, one image of {args.every}")
            image_size: InputSize = tuple(args.image_size) if args.image_size else saved_image_size(name)
            result = evaluate_model(
                # Not wrapped: this is the device, and autocast in forward where networks compute in bfloat16.
                accelerator.prepare_model(model, evaluation_mode=True),
                scored,
                image_size=image_size,
                classes=classes,
                accelerator=accelerator,
                limit=how.limit,
                skip_unreadable=True,
                workers=workers,
                **how.windows,
            )
            resize = "keep_ratio" if isinstance(image_size, KeepRatio) else "exact"
            stated = image_size.size if isinstance(image_size, KeepRatio) else image_size
            settings: dict[str, Any] = {"model": name, "image_size": stated, "resize": resize, "every": args.every}
            if args.output:  # by this a reader knows whether two files are about the same images and label maps
                settings["inputs"] = {"data": domain_contents(domain).fingerprint}
            columns.setdefault(title, []).append(settings | how.windows | result)
        if accelerator.is_main_process:
            show(called, columns, subsets)
            shown[called] = columns
    if accelerator.is_main_process and len(shown) > 1:
        print(f"\n{means(shown)}")
    if accelerator.is_main_process and args.output:
        with outputs("evaluate", *files):
            save(args.output, shown, subsets)
    accelerator.end_training()
    return 0


def models_of(given: str) -> dict[str, tuple[str, Callable[[], Loaded]]]:
    """Column title -> (folder or id, how to load it) of one argument; a folder of a run or method has several."""
    title, name = titled(given)
    students = students_of(Path(name))
    if (Path(name) / "config.json").is_file() or not students:
        return {title: (name, partial(load_model, name))}
    found: dict[str, tuple[str, Callable[[], Loaded]]] = {}
    for student in students:
        prefix = "" if title == name else f"{title} "
        found[f"{prefix}{student.parent.name}"] = str(student), partial(load_model, str(student))
        if (selected := student.parent / SELECTED).is_dir():
            found[f"{prefix}{student.parent.name} (selected)"] = str(selected), partial(load_model, str(selected))
        newest = checkpoints(student.parent)[-1:]
        if newest and student.parent.name not in SUPERVISED:
            found[f"{prefix}{student.parent.name} (teacher)"] = str(student), partial(load_teacher, newest[0])
    return found


def load_teacher(checkpoint: Path) -> Loaded:
    """The teacher of a checkpoint with its student's running statistics: what the table of the run calls teacher.

    Raises:
        ValueError: see `networks_of`.
    """
    if (checkpoint / "teacher" / WHOLE).is_file():
        student, classes = load_model(str(checkpoint / "student"))
        teacher, _ = load_model(str(checkpoint / "teacher"))
        return with_statistics_of(copy.deepcopy(teacher), student), classes
    own, averaged = networks_of(checkpoint)  # an encoder that is frozen or adapted is not in it
    names: dict[int, str] = own.config.id2label  # type: ignore[assignment]
    return with_statistics_of(averaged, own), tuple(names.values())


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


def show(path: str, columns: dict[str, list[dict[str, Any]]], subsets: dict[str, tuple[str, ...]]) -> None:
    first = next(iter(columns.values()))[0]
    print(f"\n{first['domain']}, {first['num_images']} images, IoU in %\n\n{format_table(columns, subsets)}")
    if first["unreadable"]:
        print(f"\n{len(first['unreadable'])} images could not be read and are not in these figures:", file=sys.stderr)
        print("\n".join(first["unreadable"]), file=sys.stderr)
    unscored = [name for name, row in zip(first["iou"], first["confusion"], strict=True) if not sum(row)]
    if unscored:
        print(f"\nNo pixel of {path} is labelled {', '.join(unscored)}: 0 if predicted anywhere, otherwise left out.")


def means(shown: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """A table of the mIoU on each domain, of several seeds the mean, and of the mean over the domains."""
    rows = {
        name: [spread([result["miou"] for result in seeds])["mean"] for seeds in columns.values()]
        for name, columns in shown.items()
    }
    rows["mean"] = [spread(of_model)["mean"] for of_model in zip(*rows.values(), strict=True)]
    header = ["mIoU", *next(iter(shown.values()))]
    return markdown(header, [[name, *map(number, values)] for name, values in rows.items()])


def save(output: Path, shown: dict[str, Any], subsets: dict[str, tuple[str, ...]]) -> None:
    """Everything as JSON: of one model on one domain its result, otherwise domain -> title -> results. And a CSV."""
    results = [result for columns in shown.values() for seeds in columns.values() for result in seeds]
    content = results[0] if len(results) == 1 else shown
    write_json(output, content)
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["domain", "model", "score", "mean", "sd", "sd_population", "n"])
        for path, columns in shown.items():
            for title, seeds in columns.items():
                for row, values in summarise(seeds, subsets).items():
                    writer.writerow([path, title, row, *values.values()])

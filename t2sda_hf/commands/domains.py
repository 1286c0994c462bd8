"""Reads the labelled domains that a command line names, in the same way as training reads them."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config import DomainConfig, load_config
from ..data.domains import Domain, load_domain
from ..data.sources import DRAWN
from ..data.transforms import sized
from ..evaluation.evaluator import LabelledDomain, Part, readable_part
from ..evaluation.models import titled

CONFIG_FILE = "resolved_config.yaml"
MEANING = ("label_space", "class_names", "label_ids", "label_colors")


def test_domains(args: Namespace) -> list[DomainConfig]:
    """The test domains of the config and of the flags; one for each path of --domain.

    Without a config and a path they are those of the run that the first model comes from. Windows and precision are
    those of the run wherever no config is named, see `look_as_in_run`.

    Args:
        args: of a parser that `takes_a_test_domain`.

    Raises:
        ValueError: if nothing says where the images are.
    """
    tests: tuple[DomainConfig, ...] = args.cfg.tests
    run = look_as_in_run(args)
    if run is not None and not args.domain and not tests[0].path:
        of_run = load_config(run, args.overrides, record=True)
        tests = of_run.tests
        args.cfg = replace(args.cfg, evaluation=of_run.evaluation)
        run = None
    if not args.domain and not tests[0].path:
        raise ValueError("no labelled domain was named: give --config with a file or a recipe, or --domain PATH.")
    if len(set(args.domain)) < len(args.domain):
        raise ValueError(f"--domain names the same path twice: {' '.join(args.domain)}. Give each once.")
    named = [replace(_at(path, tests), path=path) for path in args.domain] or list(tests)
    if run is None:
        return named
    of_the_run = load_config(run, record=True).tests
    as_in_run = [_at(one.path, of_the_run) for one in named]
    explained = [_explained_by(of_run, one) for of_run, one in zip(as_in_run, named, strict=True)]
    if explained != named:
        print(f"The ids of label maps are read as in the run, see {run}.", file=sys.stderr)
    return [_cut_as(of_run, one) for of_run, one in zip(as_in_run, explained, strict=True)]


def look_as_in_run(args: Namespace) -> Path | None:
    """Give `args.cfg` the windows and the precision of the run that the first model comes from (method 8.2).

    With others the same images would have other labels. What a flag says stays, and a config that is named is followed.

    Args:
        args: of a command that predicts.

    Returns:
        The config of the run; None if a config is named, or the model lies in no run.
    """
    models = args.models if "models" in args else [args.model]
    run = None if args.config else _run_of([titled(given)[1] for given in models])
    if run is None:
        return None
    flags = [word for word in args.overrides if word.startswith(("--evaluation", "--train.precision"))]
    of_run, own = load_config(run, flags, record=True), args.cfg
    seen = of_run.evaluation
    evaluation = replace(own.evaluation, mode=seen.mode, window=seen.window, stride=seen.stride)
    if seen.window is not None and seen.mode == "slide" and evaluation != own.evaluation:
        print(f"Images are seen in windows of {sized(seen.window)}, as in the run, see {run}.", file=sys.stderr)
    train = replace(own.train, precision=of_run.train.precision)
    args.cfg = replace(own, evaluation=evaluation, train=train)
    return run


def _at(path: str, tests: Sequence[DomainConfig]) -> DomainConfig:
    """Of several the one that lies at a path, or else the first: so another one is read as it is."""
    return next((test for test in tests if test.path == path), tests[0])


def _explained_by(of_run: DomainConfig, test: DomainConfig) -> DomainConfig:
    """A domain whose ids mean what they mean in the run, where neither a flag nor the domain itself says it."""
    if test.layout or test.path in DRAWN or any(getattr(test, name) for name in MEANING):
        return test
    default = DomainConfig()
    taken = (*MEANING, "label_map", "ignore_id")
    left_out = [name for name in taken if getattr(test, name) == getattr(default, name)]
    return replace(test, **{name: getattr(of_run, name) for name in left_out})


def _cut_as(of_run: DomainConfig, test: DomainConfig) -> DomainConfig:
    """The part of the images that the run looked at, if they are the same; otherwise that part is named."""
    if of_run.crop_box is None or test.crop_box is not None:
        return test
    if Path(test.path).absolute() == Path(of_run.path).absolute():
        return replace(test, crop_box=of_run.crop_box)
    box = " ".join(map(str, of_run.crop_box))
    print(f"The run cut its test images to --crop_box {box}; {test.path} is read whole.", file=sys.stderr)
    return test


def _run_of(models: Sequence[str]) -> Path | None:
    """The config of the run that the first of some models comes from, if it lies there."""
    for folder in map(Path, models):
        of_checkpoint = folder.parent.parent  # of whose student the folder may be
        places = (folder.parent, of_checkpoint, folder)
        for file in (*(place / CONFIG_FILE for place in places), *sorted(folder.glob(f"*/{CONFIG_FILE}"))):
            if file.is_file():
                return file
    return None


def test_domain(args: Namespace) -> DomainConfig:
    """`test_domains` of a command that looks at one."""
    first, *others = test_domains(args)
    if others:
        named = ", ".join(one.path for one in (first, *others))
        raise ValueError(f"--domain takes one domain here, got {named}. Call the command for each.")
    return first


def open_labelled(config: DomainConfig, classes: Sequence[str], advice: str) -> Domain:
    """`load_domain`, with advice for those whose images have no labels."""
    try:
        return load_domain(config, classes)
    except ValueError as error:
        unlabelled = any(phrase in str(error) for phrase in ("has no column", "its labels are needed"))
        raise ValueError(f"{error}{f' {advice}' if unlabelled else ''}") from error


def readable(domain: LabelledDomain) -> Part:
    """A domain without the images that cannot be read, which are listed and counted."""
    part, unreadable = readable_part(domain)
    if unreadable:
        print(f"{len(unreadable)} of {len(domain)} images of {domain.name} could not be read:", file=sys.stderr)
        print("\n".join(unreadable), file=sys.stderr)
    return part

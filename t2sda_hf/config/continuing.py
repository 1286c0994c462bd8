"""A finished run goes on with a further target: the config of the old run, and flags that change it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from .keys import require
from .load import load_config, parse_yaml
from .run import DomainConfig, RunConfig, shares_of

_READ_ALIKE = ("split", "image_column", "resize", "resize_mode", "max_pixels")  # of a target, whatever its labels are


def continued(config: str | None, target: str, replay: float, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """What `load_config` needs of a run that goes on: the file of the finished one, and flags.

    The flags are a list of targets with shares, a list of tests, and a start from the finished student; nothing else.

    Args:
        config: folder of the finished run, or the config or recipe that says where it is.
        target: path of the further target, or a mapping of its keys in YAML's form.
        replay: share of the target images that are of the old targets, in (0, 1).
        overrides: flags that win over those that are worked out.

    Raises:
        ValueError: if there is no finished run that adapts, or nothing says where the labels of the target's test are.
    """
    require(0 < replay < 1, "--replay", "a share between 0 and 1", replay)
    if not config:
        raise ValueError("--continue_on needs --config with the folder of a finished run, or what it was trained with.")
    folder = Path(config) if Path(config).is_dir() else Path(load_config(config).output_dir)
    method, old = _finished(folder)
    given = parse_yaml(target, "--continue_on")
    keys: Mapping[str, Any] = given if isinstance(given, dict) else {"path": target}
    require(bool(keys.get("path")), "--continue_on", "a path, or keys of a domain with a path", target)
    first, usual = old.targets[0], DomainConfig()
    alike = {name: getattr(first, name) for name in _READ_ALIKE if getattr(first, name) != getattr(usual, name)}
    images = keys["path"], keys.get("split", first.split)
    if (_place(images[0]), images[1]) in [(_place(one.path), one.split) for one in old.targets]:
        raise ValueError(
            f"{images[0]!r} ({images[1]}) is a target of {folder} already. Give a further one, or train that run for "
            "longer with train.max_steps and --resume auto."
        )
    replayed = zip(old.targets, shares_of(old.target), strict=True)
    targets = [_given(replace(one, share=replay * share), usual) for one, share in replayed]
    tests = [_given(test, RunConfig().tests[0]) for test in old.tests]
    if all(_place(test["path"]) != _place(keys["path"]) for test in tests):
        beside = [test for test in tests if _place(test["path"]) == _place(first.path)]
        if not beside and not any(word.startswith("--test=") for word in overrides):
            raise ValueError(
                f"on which labelled images of {keys['path']!r} is the run tested? The test of {folder} does not lie "
                "where its target lies. Give the old and the new ones: --test '[{path: ...}, {path: ...}]'."
            )
        tests += [{**test, "name": "", "path": keys["path"]} for test in beside]
    words = [
        f"--target={_in_a_line([*targets, {**alike, **keys, 'share': 1 - replay}])}",
        f"--test={_in_a_line(tests)}",
        f"--start_model={folder / method / 'student'}",
        f"--output_dir={folder}_continued",
        "--uda.source_phase=0",
    ]
    if old.labelled_target is not None and not old.target_labelled.path:  # target_labels are those of the old target
        words.append(f"--target_labelled={_in_a_line([_given(old.labelled_target, usual)])[1:-1]}")
    return str(folder / method / "resolved_config.yaml"), [*words, *overrides]


def _finished(folder: Path) -> tuple[str, RunConfig]:
    """Name and config of the method of a finished run that adapts."""
    for file in sorted(folder.glob("*/resolved_config.yaml")):
        cfg = load_config(file, record=True)
        if cfg.method in ("t2sda", "source_free") and (file.parent / "metrics.json").is_file():
            return cfg.method, cfg
    raise ValueError(
        f"{str(folder)!r} holds no finished run of method t2sda or source_free, so there is nothing to continue. Give "
        "its folder as --config."
    )


def _place(path: str) -> str:
    """The same for every spelling of one path on this machine."""
    return os.path.realpath(path) if os.path.exists(path) else path


def _in_a_line(domains: Sequence[Mapping[str, Any]]) -> str:
    return yaml.safe_dump(list(domains), default_flow_style=True, width=10**6).strip()


def _given(domain: DomainConfig, usual: DomainConfig) -> dict[str, Any]:
    """The keys of a domain that are not the usual ones, for YAML."""
    different = {name: value for name, value in asdict(domain).items() if value != getattr(usual, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in different.items()}

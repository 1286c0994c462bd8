"""Reads the labelled domains that a command line names, in the same way as training reads them."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from ..config import DomainConfig
from ..data.domains import Domain, load_domain
from ..evaluation.evaluator import LabelledDomain, Part, readable_part


def test_domains(args: Namespace) -> list[DomainConfig]:
    """The test domain of the config and of the flags; one for each path of --domain.

    Args:
        args: of a parser that `takes_a_test_domain`.

    Raises:
        ValueError: if nothing says where the images are.
    """
    test: DomainConfig = args.cfg.test
    if not args.domain and not test.path:
        raise ValueError("no labelled domain was named: give --config with a file or a recipe, or --domain PATH.")
    return [replace(test, path=path) for path in args.domain] or [test]


def test_domain(args: Namespace) -> DomainConfig:
    """`test_domains` of a command that looks at one."""
    first, *others = test_domains(args)
    if others:
        raise ValueError(f"--domain takes one domain here, got {', '.join(args.domain)}. Call the command for each.")
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

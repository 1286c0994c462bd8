"""The labelled domains that a command line names, as training would read them."""

from argparse import Namespace
from dataclasses import replace

from ..config import DomainConfig


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

"""Publish a finished run on the Hub, with a model card: python scripts/push_to_hub.py outputs/demo user/name

One commit, or nothing. Repeat the command after a failure: what is there already is not sent again. --output DIR writes
the files to DIR instead of sending them; --card DIR writes only the card, its facts and its pictures.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory

from t2sda_hf.hub.card import OTHER_FACTS, RUN_FACTS
from t2sda_hf.hub.push import PushFailed, push_run, stage_run
from t2sda_hf.masking import run_masked

FACTS = (*RUN_FACTS, *OTHER_FACTS)
CARD_FILES = ("README.md", "facts.json", "panel.png", "curve.png", "metrics.json", "resolved_config.yaml")


def pairs(words: Sequence[str], names: Sequence[str], flag: str) -> dict[str, str]:
    """["a=b"] -> {"a": "b"}, with names out of `names`."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in names:
            raise ValueError(f"{flag} takes NAME=TEXT with a name out of {', '.join(names)}; got {word!r}.")
        found[name] = value
    return found


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, help="output_dir of scripts/train_uda.py, or a method's folder in it")
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--private", action="store_true", help="if the repository is made now")
    parser.add_argument("--create-pr", action="store_true", help="offer a pull request")
    parser.add_argument("--license", default="", help="of the weights, an id of the Hub; default: the run's config")
    parser.add_argument(
        "--terms", nargs="+", default=[], metavar="DOMAIN=TEXT", help="source=..., target=..., test=..."
    )
    parser.add_argument("--source_only", default="", metavar="DIR", help="a source-only run to compare with")
    parser.add_argument("--fact", action="append", default=[], metavar="NAME=TEXT", help=", ".join(FACTS))
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, metavar="DIR", help="write the files here, send nothing")
    where.add_argument("--card", type=Path, metavar="DIR", help="write the card, its facts and pictures here")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> str:
    given: dict[str, object] = {"license": args.license, "source_only": args.source_only}
    given["terms"] = pairs(args.terms, ("source", "target", "test"), "--terms")
    given |= pairs(args.fact, FACTS, "--fact")
    if args.output is not None:
        if args.output.exists():
            raise ValueError(f"{args.output} exists: nothing is overwritten, choose another --output.")
        stage_run(args.run_folder, args.repo_id, args.output, given)
        return f"Written, not sent: {args.output}"
    if args.card is not None:
        with TemporaryDirectory() as temporary:
            stage_run(args.run_folder, args.repo_id, Path(temporary) / "all", given)
            args.card.mkdir(parents=True, exist_ok=True)
            for name in CARD_FILES:
                copy(Path(temporary) / "all" / name, args.card / name)
        return f"Written: {args.card / 'README.md'}"
    url = push_run(args.run_folder, args.repo_id, private=args.private, create_pr=args.create_pr, given=given)
    return f"Published: {url}"


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        print(run(parse_arguments(arguments)))
    except (ValueError, PushFailed) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))

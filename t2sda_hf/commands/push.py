"""Publish a finished run on the Hub, with a model card.

    t2sda push outputs/demo USER/streets-t2sda
    t2sda push outputs/mine USER/name --license cc-by-4.0 --terms "source=own renderings" "target=own photographs"
    t2sda push outputs/mine USER/name --output staged          write the files, send nothing
    t2sda push outputs/mine USER/name --card model_cards/mine  write the card, its facts and its pictures

All files are sent in one commit. If something fails, nothing is published. Then repeat the command: files that are
already on the Hub are not sent again.

The card is written from the files of the run. With --fact you can give facts that these files do not hold: command,
commit, hardware, software, start (what the weights of the encoder are), note (what else a reader of the scores must
know) and code (URL of the repository from which t2sda_hf is installed).
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory

from ..hub.card import OTHER_FACTS, RUN_FACTS
from ..hub.push import push_run, stage_run
from ..storage import foreign_json

FACTS = (*RUN_FACTS, *OTHER_FACTS)
CARD_FILES = ("README.md", "facts.json", "panel.png", "curve.png", "metrics.json", "resolved_config.yaml")


def run(args: Namespace) -> int:
    print(publish(args))
    return 0


def publish(args: Namespace) -> str:
    """Do it; the line that says what was done."""
    given: dict[str, object] = {"license": args.license, "source_only": args.source_only}
    given["terms"] = pairs(args.terms, ("source", "target", "target_labelled", "test"), "--terms")
    given |= pairs(args.fact, FACTS, "--fact")
    if args.output is not None:
        if args.output.exists():
            raise ValueError(f"{args.output} exists: nothing is overwritten, choose another --output.")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=args.output.parent) as temporary:  # renamed last: it exists whole or not at all
            stage_run(args.run_folder, args.repo_id, Path(temporary) / "all", given)
            (Path(temporary) / "all").rename(args.output)
        return f"Written, not sent: {args.output}"
    if args.card is not None:
        facts = args.card / "facts.json"
        is_card = facts.exists() and not foreign_json(facts, {"repo_id", "student"})
        if in_the_way := [args.card / name for name in CARD_FILES if (args.card / name).exists() and not is_card]:
            raise ValueError(f"{in_the_way[0]} exists, and {args.card} is no card of a run: choose another --card.")
        with TemporaryDirectory() as temporary:
            stage_run(args.run_folder, args.repo_id, Path(temporary) / "all", given)
            args.card.mkdir(parents=True, exist_ok=True)
            for name in CARD_FILES:
                copy(Path(temporary) / "all" / name, args.card / name)
        return f"Written: {args.card / 'README.md'}"
    url = push_run(args.run_folder, args.repo_id, private=args.private, create_pr=args.create_pr, given=given)
    return f"Published: {url}"


def pairs(words: Sequence[str], names: Sequence[str], flag: str) -> dict[str, str]:
    """["a=b"] -> {"a": "b"}, with names out of `names`."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in names:
            raise ValueError(f"{flag} takes NAME=TEXT with a name out of {', '.join(names)}; got {word!r}.")
        found[name] = value
    return found

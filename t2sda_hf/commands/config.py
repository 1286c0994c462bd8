"""Explain the keys of a config: type, default, range and source of each key, and what a change of its value affects.

    t2sda config                          all keys, by section
    t2sda config pull.temperature uda     one key; a section; or all keys that have this word in their name
    t2sda config --resolve demo           every key of a recipe or file, with the value that a run of it would use
    t2sda config --schema                 the JSON schema with which editors complete and check YAML files

Below a key and its default stand its meaning, the source of the default in brackets, and the values that it takes.

[P]      the paper states the value
[D]      the public DAFormer code, on which the paper builds, has the value
[O A3]   the paper leaves this choice open; A3 is its entry in docs/open-points.md
no mark  the value is our own choice

The last line of a key also says if another value does not change what is learned.
"""

import json
from argparse import Namespace
from textwrap import fill

from ..config import Key, RunConfig, dump_config, in_words, json_schema, keys, load_config, unknown_key

CHANGES = {
    "learning": "",
    "placement": "; says only where the input lies",
    "scoring": "; changes only what is scored or kept",
    "nothing": "; changes nothing of the result",
}


def run(args: Namespace) -> int:
    if args.schema:
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
    elif args.resolve is not None:
        print(dump_config(load_config(args.resolve)), end="")
    else:
        print("\n".join(explain(args.keys)))
    return 0


def explain(asked: list[str]) -> list[str]:
    """Lines for the keys that are asked for, by section; all for [].

    Raises:
        ValueError: for a word that no key has in its name, with the nearest key.
    """
    chosen: dict[str, Key] = {}
    for word in asked or [""]:
        exact = {name: key for name, key in keys().items() if name == word or name.startswith(f"{word}.")}
        found = exact or {name: key for name, key in keys().items() if word in name}
        if not found:
            raise ValueError(unknown_key(word, "the command line"))
        chosen |= found
    lines: list[str] = []
    section: str | None = None
    for key in chosen.values():
        if (at := key.name.rpartition(".")[0]) != section:
            section = at
            lines += ["", f"{section}: {_about(section)}" if section else _about(section), ""]
        lines += _lines(key)
    return lines[1:]


def _about(section: str) -> str:
    """The first line of what a section's dataclass says of itself."""
    node: object = RunConfig()
    for part in section.split(".") if section else []:
        node = getattr(node, part)
    return (type(node).__doc__ or "").split("\n")[0]


def _lines(key: Key) -> list[str]:
    """The key with its default, what it means, and what it takes."""
    meaning = f"{key.meaning}.{f' [{key.source}]' if key.source else ''}"
    takes = in_words(key.type).replace(" (a number in quotes)", "") + (f", {key.range}" if key.range else "")
    note = f"takes {takes}{CHANGES[key.changes]}"
    indented = (
        fill(text, 116, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        for text in (meaning, note)
    )
    return [f"{key.name} = {json.dumps(key.default, ensure_ascii=False)}", *indented]

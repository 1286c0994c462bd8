"""Print the script with which a shell completes subcommands and flags.

t2sda completion bash > ~/.local/share/bash-completion/completions/t2sda
"""

from argparse import ArgumentParser, Namespace

import shtab

from ..cli import COMMANDS, Parser


def run(args: Namespace) -> int:
    print(shtab.complete(whole_parser(), args.shell))
    return 0


def whole_parser() -> ArgumentParser:
    """All commands as one tree, which is what shtab reads."""
    parser = Parser(prog="t2sda")
    words = parser.add_subparsers(dest="command", parser_class=Parser)
    for name, command in COMMANDS.items():
        command.flags(words.add_parser(name, help=command.summary))
    return parser

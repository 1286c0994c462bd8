"""The command `t2sda`: every word that it knows, and the one place where an error becomes a line and an exit code.

Words come in here and go, as a namespace, to `run(args)` of the module in `commands/` that has the command's name. That
module, and all that is heavy, is imported only after the words were understood: help and refusals come at once.
"""

import argparse
import ast
import difflib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

from .config import keys, load_config, recipe_names, unknown_key
from .data.layouts import LAYOUTS
from .errors import Ended, Stopped
from .launching import FLAGS as LAUNCH_FLAGS
from .launching import launch
from .masking import mask, run_masked

FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}
SIZE: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
MODEL = "folder or Hub id of a T2S-DA model or a SegFormer"


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are ValueErrors, and in whose flags "-" and "_" are the same."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.takes_keys = False

    def error(self, message: str) -> Any:
        raise ValueError(f"{message[0].lower()}{message[1:]}. See `{self.prog} --help`.")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The namespace of a command line.

        Raises:
            ValueError: for a word that is not understood, with the nearest that would be.
        """
        flags = {flag.replace("-", "_"): action for action in self._actions for flag in action.option_strings}
        given, left = list[str](), list(words)
        while left:
            word = left.pop(0)
            flag, equals, value = word.partition("=")
            if flag.startswith("--") and flag != "--":
                action = flags.get(flag.replace("-", "_"))
                if action is None:
                    raise ValueError(self._unknown(flag))
                word = action.option_strings[-1] + equals + value
                if isinstance(action, _Key) and not equals:
                    word += f"={_value(str(action.const), left)}"
            given.append(word)
        args = self.parse_intermixed_args(given)
        args.words = given
        return args

    def _unknown(self, flag: str) -> str:
        aliases = [name for action in self._actions for name in action.option_strings if name[2:] != action.const]
        near = difflib.get_close_matches(flag, aliases, 1, 0.75)
        if self.takes_keys and not near:
            return unknown_key(flag[2:].replace("-", "_"), "the command line")
        hint = f" Did you mean {near[0]}?" if near else f" See `{self.prog} --help`."
        return f"unknown flag {flag}.{hint}"

    def takes_a_run(self, config: str = "--config", without: Sequence[str] = (), **how: Any) -> None:
        """Let the command take a config, and every key of a run as a flag: `--a.b v`, `--a.b=v` and `--set a.b=v`.

        Args:
            config: the flag or place of the config.
            without: sections whose names are other flags of the command.
            how: of the argument `config`.
        """
        self.takes_keys = True
        recipes = {"metavar": "CONFIG", "help": "a YAML file, or a recipe: see `t2sda train --list`"}
        self.add_argument(config, **(recipes | how))
        self.add_argument(
            "--set", action=_Set, metavar="KEY=VALUE", help="any key of a run, also as --KEY VALUE: see `t2sda config`"
        )
        self.set_defaults(overrides=[])
        for name in keys():
            self.takes_key(f"--{name}", name)
        for name in sorted({name.rpartition(".")[0] for name in keys()} - {"", *without}):  # as YAML, as in a file
            self.add_argument(f"--{name}", action=_Key, const=name, help=argparse.SUPPRESS, metavar="VALUE")

    def takes_key(self, flag: str, name: str, help_text: str = argparse.SUPPRESS) -> None:
        """Let a flag be a key of the run. Lists may be written as several words."""
        found = keys()[name].list_of
        metavar = "VALUE ..." if found and found[1] is None else "HEIGHT WIDTH" if found and found[1] == 2 else "VALUE"
        self.add_argument(flag, action=_Key, const=name, help=help_text, metavar=metavar)

    def takes_a_test_domain(self, without: Sequence[str] = ()) -> None:
        """Let the command take a labelled domain as training does: the test domain of a config, or its keys."""
        self.takes_a_run(without=without)
        self.add_argument(
            "--domain",
            nargs="+",
            default=[],
            metavar="PATH",
            help="what to read instead of test.path of the config: names of domains, parquet, folders, data sets",
        )
        others = ", ".join(name[5:] for name in keys() if name.startswith("test.") and name != "test.path")
        for name in (name for name in keys() if name.startswith("test.") and name != "test.path"):
            shown = name in ("test.split", "test.label_space", "test.class_names")
            self.takes_key(
                f"--{name[5:]}", name, keys()[name].meaning.replace("%", "%%") if shown else argparse.SUPPRESS
            )
        self.epilog = fill(f"Every key of a domain is a flag, with or without test. before it: {others}.", 79)

    def takes_inference(self) -> None:
        """How a model looks at an image."""
        for name in ("mode", "window", "stride"):
            self.takes_key(f"--{name}", f"evaluation.{name}", keys()[f"evaluation.{name}"].meaning)
        self.add_argument("--image_size", **SIZE, help="network input; default: what is saved with the model")


class _List(argparse.Action):
    """Names the recipes, as --help prints the help."""

    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        print("\n".join(recipe_names()))
        parser.exit()


class _Set(argparse.Action):
    """KEY=VALUE for `load_config`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        name, equals, text = str(value).partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {value!r}.")
        namespace.overrides = [*namespace.overrides, f"--{name}={text}"]


class _Key(argparse.Action):
    """A flag that is a key of the run, for `load_config`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        namespace.overrides = [*namespace.overrides, f"--{self.const}={value}"]


def _value(name: str, left: list[str]) -> str:
    """The words that are the value of a key, as YAML; they are taken from `left`.

    A list is one word in YAML's form, or as many words as it has items. One of any number ends at the next flag.

    Raises:
        ValueError: if there is none.
    """
    found = keys()[name].list_of if name in keys() else None
    if not left or left[0].startswith("--"):
        raise ValueError(f"--{name} needs a value.")
    if found is None or left[0][:1] in "[{" or left[0] in ("null", "~"):
        return left.pop(0)
    kind, number = found
    items: list[str] = []
    while left and not left[0].startswith("--") and (number is None or len(items) < number):
        items.append(left.pop(0))
    return f"[{', '.join(json.dumps(item) if kind is str else item for item in items)}]"


def seeds_of(text: str) -> list[int]:
    """ "0..4" or "0,3,7" -> seeds."""
    first, dots, last = text.partition("..")
    try:
        found = list(range(int(first), int(last) + 1)) if dots else [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"takes a range like 0..4 or a list like 0,3,7 of different seeds, got {text!r}"
        )
    return found


# ---------------------------------------------------------------------------------------------------- the commands


def _launching(parser: Parser) -> None:
    for flag, how in LAUNCH_FLAGS.items():
        parser.add_argument(flag, **how)


def _train(parser: Parser) -> None:
    parser.takes_a_run()
    parser.add_argument("--list", action=_List, nargs=0, help="name the recipes that are shipped")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="two updates, a checkpoint and an evaluated image; says what memory and time the run takes",
    )
    overfit = "learn one batch over and over, to find faults"
    parser.add_argument(
        "--overfit-batch", action="append_const", dest="overrides", const="--train.overfit_batch=true", help=overfit
    )
    _launching(parser)


def _evaluate(parser: Parser) -> None:
    parser.add_argument("models", nargs="+", metavar="[TITLE=]MODEL", help=f"{MODEL}, or the folder of a run")
    parser.takes_a_test_domain()
    parser.takes_key("--limit", "evaluation.limit", keys()["evaluation.limit"].meaning)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every so many-th image")
    parser.add_argument(
        "--subset", nargs="+", default=[], metavar="NAME=CLASS,CLASS", help="also the mIoU over these classes"
    )
    parser.takes_inference()
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="scores and matrices; a .csv of the table too")
    _launching(parser)


def _predict(parser: Parser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("images", type=Path, nargs="?", help="an image, a video or a folder of them")
    parser.add_argument("--output", required=True, **FOLDER)
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist in DIR")
    parser.add_argument("--confidence", action="store_true", help="also how sure the model is of every pixel")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="a labelled domain instead of images: truth and errors beside predictions",
    )
    parser.takes_a_test_domain()
    parser.takes_key("--limit", "evaluation.limit", "with --compare, only the first so many images")
    parser.takes_inference()


def _check(parser: Parser) -> None:
    parser.takes_a_run()
    parser.add_argument("--output", default=Path("outputs/check"), **FOLDER)
    domains = ("source", "target", "test")
    parser.add_argument("--only", nargs="+", choices=domains, default=list(domains), help="default: all three")
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="images on a sheet")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")


def _prepare(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help=", ".join(LAYOUTS), choices=tuple(LAYOUTS))
    parser.add_argument("--root", required=True, metavar="DIR", help="folder of the unpacked download; only read")
    parser.add_argument("--output", required=True, **FOLDER)
    parser.add_argument("--size", **SIZE, help="default: keep the files")
    parser.add_argument("--resize_mode", choices=("keep_ratio", "exact"), default="keep_ratio")
    parser.add_argument("--encoding", choices=("png", "jpeg", "raw"), default="png", help="of resized images")
    parser.add_argument("--splits", nargs="+", default=[], help="default: all")
    parser.add_argument("--unlabelled", nargs="+", default=[], metavar="SPLIT", help="splits prepared without labels")
    parser.add_argument("--incomplete", action="store_true", help="accept fewer images than the complete download has")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one per core")


def _analyze(parser: Parser) -> None:
    parser.add_argument("models", nargs="+", metavar="[TITLE=]MODEL", help="model folders or Hub ids, of equal classes")
    parser.takes_a_test_domain(without=("source",))
    parser.add_argument("--no_labels", action="store_true", help="the domain has no labels")
    parser.add_argument(
        "--source", metavar="PATH", help="the source, for similarity and t-SNE; default: source.path of the config"
    )
    parts = ("similarity", "distances", "tsne", "pictures")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="default: all")
    parser.add_argument(
        "--feature", choices=("head", "encoder_concat", "proj"), default="head", help="which map of the model"
    )
    parser.add_argument("--limit", type=int, default=500, metavar="N", help="at most so many images of each domain")
    parser.add_argument("--per_class", type=int, default=256, metavar="N", help="pixels per class and domain for t-SNE")
    threshold = "confidence for the coverage, with --no_labels; default: that of the config"
    parser.takes_key("--threshold", "uda.pseudo_threshold", threshold)
    parser.add_argument("--num_pictures", type=int, default=4, metavar="N")
    parser.add_argument("--output", default=Path("outputs/analysis"), **FOLDER)


def _compare(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `t2sda train` wrote")
    parser.add_argument(
        "--proxies", action="store_true", help="instead: how well proxies without labels choose among runs and weights"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="folder of the page (default: outputs/comparison), or CSV of proxies",
    )


def _repeat(parser: Parser) -> None:
    parser.takes_a_run("configs", nargs="+")
    parser.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], help="0..4 or 0,3,7; default: 0..2")
    parser.add_argument("--output", default=Path("outputs/repeat"), **FOLDER)
    _launching(parser)


def _tables(parser: Parser) -> None:
    parser.takes_a_run("tables", nargs="+", metavar="TABLE", help="table02 ... table17, or a file of that form")
    parser.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], help="0..4 or 0,3,7; default: 0..2")
    parser.add_argument("--scale", choices=("demo", "camvid", "paper"), default="paper")
    parser.add_argument("--output", default=Path("outputs/ablations"), **FOLDER)
    parser.add_argument("--dry-run", action="store_true", help="list the cells and their estimated time")
    _launching(parser)


def _estimate(parser: Parser) -> None:
    parser.takes_a_run("config", nargs="?")
    parser.add_argument("--measure", type=int, metavar="N", help="make N real updates here, at least 2, and compare")


def _demo(parser: Parser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--compare", metavar="MODEL", help="the source-only model, shown beside it")
    parser.add_argument("--examples", **FOLDER, help="images to pick; default: drawn streets")
    parser.add_argument("--title", default="Street scenes, adapted without labels")
    parser.add_argument("--port", type=int)
    parser.add_argument("--space", **FOLDER, help="write a Space of the Hub here instead")


def _export(parser: Parser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("output", type=Path, metavar="FILE.onnx")


def _push(parser: Parser) -> None:
    parser.add_argument("run_folder", type=Path, help="folder that `t2sda train` wrote, or a method's folder in it")
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--private", action="store_true", help="if the repository is made now")
    parser.add_argument("--create-pr", action="store_true", help="offer a pull request")
    parser.add_argument("--license", default="", help="of the weights, an id of the Hub; default: the run's config")
    parser.add_argument(
        "--terms", nargs="+", default=[], metavar="DOMAIN=TEXT", help="source=..., target=..., test=..."
    )
    parser.add_argument("--source_only", default="", metavar="DIR", help="a source-only run to compare with")
    parser.add_argument(
        "--fact", action="append", default=[], metavar="NAME=TEXT", help="of the card, where no file has it"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", **FOLDER, help="write the files here, send nothing")
    where.add_argument("--card", **FOLDER, help="write the card, its facts and pictures here")


def _convert(parser: Parser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC.pth", help="of DAFormer, HRDA, MIC, SegFormer or DeepLab-V2")
    parser.add_argument("output", help="must not exist", **FOLDER)
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="default: student")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="in the order of the outputs; default: of SRC, else Cityscapes' 19"
    )
    parser.add_argument(
        "--image_size",
        **SIZE,
        help="network input; default for Cityscapes' classes: 512 1024, HRDA 1024 2048; for others images keep theirs",
    )


def _translator(parser: Parser) -> None:
    parser.add_argument(
        "action",
        choices=("train", "preview", "apply"),
        help="train a network; show what engines of a config do; write the translations of all source images",
    )
    parser.takes_a_run(without=("source", "target"))
    parser.takes_key("--source", "source.path", "default: that of the config")
    parser.takes_key("--target", "target.path", "default: that of the config")
    train = parser.add_argument_group("train")
    train.add_argument("--crop", type=int, nargs=2, default=[256, 256], metavar=("HEIGHT", "WIDTH"))
    train.add_argument("--steps", type=int, default=100_000, metavar="N")
    train.add_argument("--batch_size", type=int, default=1, metavar="N", help="per process")
    train.add_argument("--lr", type=float, default=2e-4)
    train.add_argument("--width", type=int, default=32, help="channels of the generators at full resolution")
    train.add_argument("--blocks", type=int, default=6, help="residual blocks of a generator")
    show = parser.add_argument_group("preview and apply")
    show.add_argument("--engine", nargs="+", metavar="ENGINE", help="default: that of the config")
    show.add_argument("--count", type=int, default=4, metavar="N", help="source images in the picture")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="folder; picture of preview (default: outputs/translation.png)"
    )
    _launching(parser)


def _config(parser: Parser) -> None:
    parser.add_argument("keys", nargs="*", metavar="KEY", help="explain these; sections and parts of names, too")
    parser.add_argument("--schema", action="store_true", help="the JSON schema of a YAML file, for editors")
    parser.add_argument("--resolve", metavar="CONFIG", help="every key of a recipe or file with its value")


def _env(parser: Parser) -> None:
    pass


def _completion(parser: Parser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


@dataclass(frozen=True)
class Command:
    """One word after `t2sda`: what it does in one line, its flags, and when one process per GPU does it."""

    summary: str
    flags: Callable[[Parser], None]
    launched: Callable[[argparse.Namespace], bool] = lambda args: False


COMMANDS = {
    "train": Command("adapt a segmentation model to an unlabelled domain", _train, lambda args: True),
    "evaluate": Command("score models on labelled domains", _evaluate, lambda args: True),
    "predict": Command("segment images, folders and videos", _predict),
    "check": Command("find what is wrong with the data of a run before the run does", _check),
    "prepare": Command("turn the download of a public data set into parquet shards", _prepare),
    "analyze": Command("look into models as the paper does: similarity, distances, t-SNE", _analyze),
    "compare": Command("several runs on one page; or how well proxies choose among them", _compare),
    "repeat": Command("one or two configs with several seeds: mean, sd, paired difference", _repeat),
    "tables": Command("train what is missing of a table of the paper, and print it", _tables),
    "estimate": Command("memory and time of a run before it starts, here and on GPUs", _estimate),
    "demo": Command("try a model in the browser, or write a Space", _demo),
    "export": Command("write a model as ONNX, for any image size", _export),
    "push": Command("publish a finished run on the Hub, with a model card", _push),
    "convert": Command("turn a released checkpoint into a folder for from_pretrained", _convert),
    "translator": Command(
        "train a translator, look at engines, or translate a source domain",
        _translator,
        lambda args: args.action == "train",
    ),
    "config": Command("what every key of a run means", _config),
    "env": Command("versions and devices, for a bug report", _env),
    "completion": Command("print what a shell needs to complete these words", _completion),
}


def parser_of(name: str) -> Parser:
    """The parser of one command. Its description is the docstring of its module, which is read, not imported."""
    text = (Path(__file__).parent / "commands" / f"{name}.py").read_text(encoding="utf-8")
    parser = Parser(prog=f"t2sda {name}", description=ast.get_docstring(ast.parse(text)))
    COMMANDS[name].flags(parser)
    return parser


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: t2sda COMMAND ...   (t2sda COMMAND --help says more)",
            "",
            "Take a segmentation model to images nobody has labelled.",
            "",
            *lines,
            "",
            "To begin: t2sda train --config demo",
        ]
    )


def main(words: Sequence[str] | None = None, door: str = "t2sda") -> int:
    """Do what a command line says; the exit code.

    0; 2 when the input is at fault; 143 or 130 after SIGTERM or SIGINT; 1 for what else ends a command. All but 0 come
    with one line that says why.

    Args:
        words: of the command line, after the name of the program; None takes those of this process.
        door: what was started, for the record of a run.
    """
    words = list(sys.argv[1:] if words is None else words)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(overview())
            return 0
        if words[0] in ("-V", "--version"):
            print(version("t2sda_hf"))
            return 0
        name, *rest = words
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            raise ValueError(f"unknown command {name!r}. {f'Did you mean {near[0]!r}?' if near else overview()}")
        parser = parser_of(name)
        args = parser.read(rest)
        args.door = door
        if parser.takes_keys and name != "tables":  # whose files hold many runs
            args.cfgs = [
                load_config(path, args.overrides) for path in vars(args).get("configs", [vars(args).get("config")])
            ]
            args.cfg = args.cfgs[0]
        if door == "t2sda" and COMMANDS[name].launched(args):
            code = launch(name, args)
            if code is not None:
                return code
        done: int = importlib.import_module(f".commands.{name}", __package__).run(args)
        return done
    except Ended as error:
        return _end(error.exit_code, error if error.alone or os.environ.get("RANK", "0") == "0" else None)
    except ValueError as error:
        return _end(2, error)
    except OSError as error:
        return 0 if isinstance(error, BrokenPipeError) and _nobody_reads() else _end(1, error)
    except KeyboardInterrupt:
        return _end(128 + signal.SIGINT, Stopped(signal.SIGINT, "what was finished before is kept"))
    except SystemExit as error:  # of argparse, after it printed a help
        return int(error.code or 0)


def _nobody_reads() -> bool:
    """Whether stdout is closed (`t2sda config | head`): then nothing more is written there."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _end(code: int, error: Exception | None) -> int:
    if error is not None:
        print(mask(f"{type(error).__name__}: {error}"), file=sys.stderr)
    return code


def entry() -> None:
    """The console script: `main` with a mask over all that the process prints."""
    sys.exit(run_masked(main))

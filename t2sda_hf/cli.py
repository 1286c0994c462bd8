"""The command `t2sda`: its subcommands and flags, and the only place where an error becomes a line and an exit code.

The words of a command line are read here. They go, as a namespace, to `run(args)` of the module in `commands/` that has
the name of the subcommand. This module, and every heavy library, is imported only after the words were understood. So
help and refusals are printed at once.
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
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

from .config import continued, keys, load_config, recipe_names, unknown_key
from .data.layouts import LAYOUTS, ROLES
from .errors import Ended, Stopped, heard
from .launching import FLAGS as LAUNCH_FLAGS
from .launching import launch
from .listing import from_home
from .masking import mask, run_masked

FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}
SIZE: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
MODEL = "folder or Hub id of a T2S-DA model or of a SegFormer"
RUN_OR_MODEL = f"{MODEL}, or the folder of a run"


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
            given.append(_from_home(word))
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
        recipes = {"metavar": "CONFIG", "help": "a YAML file, or the name of a recipe (`t2sda train --list`)"}
        self.add_argument(config, **(recipes | how))
        self.add_argument(
            "--set",
            action=_Set,
            metavar="KEY=VALUE",
            help="set any key of the config; the same as --KEY VALUE; see `t2sda config`",
        )
        self.set_defaults(overrides=[])
        for name in keys():
            self.takes_key(f"--{name}", name)
        for name in sorted({name.rpartition(".")[0] for name in keys()} - {"", *without}):  # as YAML, as in a file
            self.add_argument(f"--{name}", action=_Key, const=name, help=argparse.SUPPRESS, metavar="VALUE")

    def takes_key(self, flag: str, name: str, help_text: str = argparse.SUPPRESS) -> None:
        """Let a flag be a key of the run. Lists may be written as several words."""
        key, found = keys()[name], keys()[name].list_of
        choices = f"{{{','.join(key.choices)}}}" if key.choices else "VALUE"
        metavar = "VALUE ..." if found and found[1] is None else "HEIGHT WIDTH" if found and found[1] == 2 else choices
        self.add_argument(flag, action=_Key, const=name, help=help_text, metavar=metavar)

    def takes_a_test_domain(self, without: Sequence[str] = ()) -> None:
        """Let the command take a labelled domain as training does: the test domain of a config, or its keys."""
        self.takes_a_run(without=without)
        self.add_argument(
            "--domain",
            nargs="+",
            default=[],
            metavar="PATH",
            help="read these instead of test.path of the config: parquet, folders, data sets, or toy streets",
        )
        others = ", ".join(name[5:] for name in keys() if name.startswith("test.") and name != "test.path")
        for name in (name for name in keys() if name.startswith("test.") and name != "test.path"):
            shown = name in ("test.split", "test.label_space", "test.class_names", "test.max_pixels")
            self.takes_key(
                f"--{name[5:]}", name, keys()[name].meaning.replace("%", "%%") if shown else argparse.SUPPRESS
            )
        self.epilog = fill(
            f"Every key of a domain is also a flag: --split is the same as --test.split. The keys are: {others}.", 79
        )

    def takes_inference(self) -> None:
        """How a model looks at an image."""
        for name in ("mode", "window", "stride"):
            self.takes_key(f"--{name}", f"evaluation.{name}", keys()[f"evaluation.{name}"].meaning)
        self.add_argument(
            "--image_size", **SIZE, help="size of the network input; default: the one saved with the model"
        )


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


def _from_home(word: str) -> str:
    """A word, or what follows its "=" (as in TITLE=~/model), with the home folder in place of ~."""
    name, equals, value = word.partition("=")
    return f"{name}={from_home(value)}" if equals and "/" not in name else from_home(word)


def seeds_of(text: str) -> list[int]:
    """ "0..4" or "0,3,7" -> seeds."""
    first, dots, last = text.partition("..")
    found: list[int] = []
    with suppress(ValueError):
        if dots:
            found = list(range(int(first), min(int(last), int(first) + 1000) + 1))
        else:
            found = [int(part) for part in text.split(",")]
    if not found or min(found) < 0 or len(set(found)) < len(found) or len(found) > 1000:
        raise argparse.ArgumentTypeError(
            f"takes a range like 0..4 or a list like 0,3,7 of different seeds, got {text!r}"
        )
    return found


def rates_of(text: str) -> list[float]:
    """ "1e-3,3e-3" -> learning rates."""
    with suppress(ValueError):
        found = [float(part) for part in text.split(",")]
        if len(set(found)) == len(found) and all(0 < rate < 1e9 for rate in found):
            return found
    raise argparse.ArgumentTypeError(f"takes different positive numbers like 1e-3,3e-3,1e-2, got {text!r}")


def whole(least: int) -> Callable[[str], int]:
    """What reads a whole number of at least that."""

    def read(text: str) -> int:
        with suppress(ValueError):
            if (number := int(text)) >= least:
                return number
        raise argparse.ArgumentTypeError(f"takes a whole number of at least {least}, got {text!r}")

    return read


# ---------------------------------------------------------------------------------------------------- the commands


def _launching(parser: Parser) -> None:
    for flag, how in LAUNCH_FLAGS.items():
        parser.add_argument(flag, **how)


def _train(parser: Parser) -> None:
    parser.takes_a_run()
    parser.add_argument("--list", action=_List, nargs=0, help="print the names of all recipes and stop")
    parser.add_argument(
        "--continue_on",
        metavar="TARGET",
        help="go on with a finished run on a further target; --config is its folder, or what it was trained with",
    )
    parser.add_argument(
        "--replay",
        type=float,
        metavar="SHARE",
        help="with --continue_on: share of the target images that are of the old targets; default: 0.25",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="try every part of the run once, and print how much memory and time the whole run needs",
    )
    overfit = "learn the same batch again and again; losses that do not fall mean a fault"
    parser.add_argument(
        "--overfit-batch", action="append_const", dest="overrides", const="--train.overfit_batch=true", help=overfit
    )
    _launching(parser)


def _evaluate(parser: Parser) -> None:
    parser.add_argument("models", nargs="+", metavar="[TITLE=]MODEL", help=RUN_OR_MODEL)
    parser.takes_a_test_domain()
    parser.takes_key("--limit", "evaluation.limit", keys()["evaluation.limit"].meaning)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="score only every N-th image; default: 1")
    parser.add_argument(
        "--subset", nargs="+", default=[], metavar="NAME=CLASS,CLASS", help="print also the mean over these classes"
    )
    parser.takes_inference()
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write the scores and confusion matrices to this file, and the table to a .csv file beside it",
    )
    _launching(parser)


def _predict(parser: Parser) -> None:
    parser.add_argument("model", help=RUN_OR_MODEL)
    parser.add_argument("images", type=Path, nargs="?", help="an image, a video, or a folder of images and videos")
    parser.add_argument("--output", required=True, help="write the predictions into this folder", **FOLDER)
    parser.add_argument("--overwrite", action="store_true", help="replace files that already exist in DIR")
    parser.add_argument("--confidence", action="store_true", help="write also how sure the model is of every pixel")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="read a labelled domain instead of images, and show true labels and errors beside the predictions",
    )
    parser.takes_a_test_domain()
    parser.takes_key("--limit", "evaluation.limit", "with --compare: use only the first VALUE images")
    parser.takes_inference()


def _check(parser: Parser) -> None:
    parser.takes_a_run()
    parser.add_argument(
        "--output",
        default=Path("outputs/check"),
        help="write the page and the pictures into this folder; default: outputs/check",
        **FOLDER,
    )
    domains = ("source", "target", "target_labelled", "test")
    parser.add_argument(
        "--only", nargs="+", choices=domains, default=list(domains), help="check only these domains; default: all"
    )
    parser.add_argument(
        "--pictures", type=whole(0), default=8, metavar="N", help="number of images on each sheet; default: 8"
    )
    parser.add_argument(
        "--processes",
        type=whole(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of processes that read files; default: one for each core",
    )


def _prepare(parser: Parser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help=f"name of the data set: {', '.join(LAYOUTS)}; or {' or '.join(ROLES)}: of the config",
        choices=(*LAYOUTS, *ROLES),
    )
    parser.takes_a_run()
    parser.add_argument("--root", metavar="DIR", help="folder of the unpacked download; nothing in it is changed")
    parser.add_argument("--output", required=True, help="write the parquet files into this folder", **FOLDER)
    parser.add_argument("--size", **SIZE, help="resize the images to this size; default: keep the files as they are")
    parser.add_argument(
        "--resize_mode",
        choices=("keep_ratio", "exact"),
        default="keep_ratio",
        help="keep the ratio of height and width, or reach --size exactly; default: keep_ratio",
    )
    parser.add_argument(
        "--encoding",
        choices=("png", "jpeg", "raw"),
        default="png",
        help="format of resized images; raw is not compressed, large, and the fastest to read; default: png",
    )
    parser.add_argument(
        "--splits", nargs="+", default=[], metavar="SPLIT", help="prepare only these splits; default: all splits"
    )
    parser.add_argument(
        "--unlabelled", nargs="+", default=[], metavar="SPLIT", help="prepare these splits without their labels"
    )
    parser.add_argument("--incomplete", action="store_true", help="accept fewer images than the complete download has")
    parser.add_argument(
        "--processes", type=whole(1), metavar="N", help="number of processes; default: one for each core"
    )


def _analyze(parser: Parser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="[TITLE=]MODEL", help=f"{RUN_OR_MODEL}; all models must have the same classes"
    )
    parser.takes_a_test_domain(without=("source",))
    parser.add_argument("--no_labels", action="store_true", help="use this if the domain has no labels")
    parser.add_argument(
        "--source",
        metavar="PATH",
        help="source domain, for similarity and t-SNE; default: source.path of the config",
    )
    parts = ("similarity", "distances", "tsne", "pictures")
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=list(parts), help="make only these parts; default: all parts"
    )
    parser.add_argument(
        "--feature",
        choices=("head", "encoder_concat", "proj"),
        default="head",
        help="which features of the model: of its head, its encoder or its projector; default: head",
    )
    parser.add_argument(
        "--limit", type=whole(1), default=500, metavar="N", help="use at most N images of each domain; default: 500"
    )
    parser.add_argument(
        "--per_class",
        type=whole(1),
        default=256,
        metavar="N",
        help="for t-SNE: use N pixels of each class and domain; default: 256",
    )
    threshold = "with --no_labels: confidence from which a pixel counts in the coverage; default: that of the config"
    parser.takes_key("--threshold", "uda.pseudo_threshold", threshold)
    parser.add_argument(
        "--num_pictures", type=whole(1), default=4, metavar="N", help="number of images in pictures.png; default: 4"
    )
    parser.add_argument(
        "--output",
        default=Path("outputs/analysis"),
        help="write all files into this folder; default: outputs/analysis",
        **FOLDER,
    )


def _compare(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `t2sda train` wrote")
    parser.add_argument(
        "--proxies",
        action="store_true",
        help="instead of the page: print how well proxies choose among runs and weights without target labels",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="folder of the page (default: outputs/comparison); with --proxies a CSV file",
    )


def _repeat(parser: Parser) -> None:
    parser.takes_a_run("configs", nargs="+")
    parser.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], help="for example 0..4 or 0,3,7; default: 0..2")
    parser.add_argument(
        "--output",
        default=Path("outputs/repeat"),
        help="write the runs into this folder; default: outputs/repeat",
        **FOLDER,
    )
    _launching(parser)


def _tables(parser: Parser) -> None:
    parser.takes_a_run(
        "tables", nargs="+", metavar="TABLE", help="table02 ... table17, a file of the same form; fair or labels, alone"
    )
    parser.add_argument("--seeds", type=seeds_of, help="for example 0..4 or 0,3,7; default: 0..2, and 0..4 of fair")
    parser.add_argument(
        "--config", metavar="CONFIG", help="of fair and labels: the config that is compared, a file or a recipe"
    )
    parser.add_argument(
        "--labels",
        type=lambda text: text.split(","),
        metavar="N,N,...",
        help="of labels: numbers of labelled target images, shares like 1/16, or all; default: 0,8,16,32,all",
    )
    parser.add_argument(
        "--rates",
        type=rates_of,
        metavar="RATE,RATE,...",
        help="of fair and labels: learning rates that every row is tried with; default: optim.lr of the config times "
        "1/3, 1 and 3",
    )
    parser.add_argument(
        "--search_seeds",
        type=seeds_of,
        help="of fair and labels: seeds that the rates are tried with; default: the first of SEEDS",
    )
    parser.add_argument(
        "--rows",
        type=lambda text: text.split(","),
        metavar="ROW,ROW,...",
        help="train only these; of fair: source_only,self_training,t2sda,target_only; of labels: source_only,t2sda; "
        "all that is done is printed",
    )
    parser.add_argument(
        "--scale",
        choices=("demo", "camvid", "paper"),
        help="which runs: small ones on toy streets or on CamVid, or the paper's own; default: paper",
    )
    parser.add_argument(
        "--output",
        help="write the runs and tables into this folder; default: outputs/ablations, outputs/fair or outputs/labels",
        **FOLDER,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="train nothing; list the cells and the time that they should take"
    )
    _launching(parser)


def _estimate(parser: Parser) -> None:
    parser.takes_a_run("config", nargs="?")
    parser.add_argument(
        "--measure", type=int, metavar="N", help="make also N real updates here (at least 2), and compare"
    )


def _demo(parser: Parser) -> None:
    parser.add_argument("model", help=RUN_OR_MODEL)
    parser.add_argument("--compare", metavar="MODEL", help="show this source-only model beside the other one")
    parser.add_argument(
        "--examples", help="folder of images that one can choose from; default: three toy streets", **FOLDER
    )
    parser.add_argument(
        "--title",
        metavar="TEXT",
        help="title of the page; default: the name of the model",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="port of the server; default: the first free one from 7860"
    )
    parser.add_argument(
        "--space", help="write a Space of the Hub into this folder instead of opening the page", **FOLDER
    )


def _export(parser: Parser) -> None:
    parser.add_argument("model", help=RUN_OR_MODEL)
    parser.add_argument("output", type=Path, metavar="FILE.onnx", help="file to write")


def _push(parser: Parser) -> None:
    parser.add_argument(
        "run_folder", type=Path, help="folder that `t2sda train` wrote, or the folder of one method in it"
    )
    parser.add_argument("repo_id", help="name of the repository on the Hub, as user/name")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it does not exist yet")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of a direct commit")
    parser.add_argument(
        "--license", default="", help="license of the weights, as an id of the Hub; default: that of the config"
    )
    parser.add_argument(
        "--terms",
        nargs="+",
        default=[],
        metavar="DOMAIN=TEXT",
        help="terms of use of the images: source=..., target=..., test=...",
    )
    parser.add_argument(
        "--source_only", default="", metavar="DIR", help="folder of a source-only run, to compare with in the card"
    )
    parser.add_argument(
        "--fact",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="a fact for the card that is in no file of the run; can be given several times",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", help="write the files into this folder and send nothing", **FOLDER)
    where.add_argument(
        "--card", help="write the card, its facts and its pictures into this folder and send nothing", **FOLDER
    )


def _convert(parser: Parser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC.pth",
        help="checkpoint of DAFormer, HRDA, MIC, SegFormer or DeepLab-V2",
    )
    parser.add_argument("output", help="folder to write; it must not exist", **FOLDER)
    parser.add_argument(
        "--weights", choices=("student", "teacher"), default="student", help="which network to keep; default: student"
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names, in the order of the outputs; default: those in SRC.pth, or else Cityscapes' 19",
    )
    parser.add_argument(
        "--image_size",
        **SIZE,
        help="size of the network input; default for Cityscapes' classes: 512 1024, for HRDA 1024 2048; for other "
        "classes images keep their size",
    )


def _translator(parser: Parser) -> None:
    parser.add_argument(
        "action",
        choices=("train", "preview", "apply"),
        help="train a network; show in a picture what engines do; or translate all source images",
    )
    parser.takes_a_run(without=("source", "target"))
    parser.takes_key("--source", "source.path", "source domain; default: that of the config")
    parser.takes_key("--target", "target.path", "target domain; default: that of the config")
    train = parser.add_argument_group("train")
    train.add_argument(
        "--crop",
        type=int,
        nargs=2,
        default=[256, 256],
        metavar=("HEIGHT", "WIDTH"),
        help="size of the training crops; default: 256 256",
    )
    train.add_argument("--steps", type=int, default=100_000, metavar="N", help="number of updates; default: 100000")
    train.add_argument(
        "--batch_size", type=int, default=1, metavar="N", help="crops of each domain, per process; default: 1"
    )
    train.add_argument("--lr", type=float, default=2e-4, help="learning rate of both optimisers; default: 2e-4")
    train.add_argument(
        "--width", type=int, default=32, help="channels of the generators at full resolution; default: 32"
    )
    train.add_argument("--blocks", type=int, default=6, help="residual blocks of a generator; default: 6")
    show = parser.add_argument_group("preview and apply")
    show.add_argument(
        "--engine",
        nargs="+",
        metavar="ENGINE",
        help="translation engines; apply takes one; default: that of the config",
    )
    show.add_argument(
        "--count", type=whole(1), default=4, metavar="N", help="number of source images in the picture; default: 4"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="folder to write; for preview a picture (default: outputs/translation.png)",
    )
    _launching(parser)


def _config(parser: Parser) -> None:
    parser.add_argument("keys", nargs="*", metavar="KEY", help="explain these keys; a section or a part of a name, too")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a config file, for editors")
    parser.add_argument("--resolve", metavar="CONFIG", help="print every key of a recipe or file with its value")


def _env(parser: Parser) -> None:
    pass


def _completion(parser: Parser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell that you use")


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does in one line, its flags, and when it runs with one process for each GPU."""

    summary: str
    flags: Callable[[Parser], None]
    launched: Callable[[argparse.Namespace], bool] = lambda args: False


COMMANDS = {
    "train": Command("adapt a segmentation model to an unlabelled domain", _train, lambda args: True),
    "evaluate": Command("score models on labelled domains", _evaluate, lambda args: True),
    "predict": Command("segment images, folders and videos", _predict),
    "check": Command("find faults in the data of a run before you start it", _check),
    "prepare": Command("turn the download of a public data set into parquet files", _prepare),
    "analyze": Command("look into models as the paper does: similarity, distances, t-SNE", _analyze),
    "compare": Command("show several runs on one page, or test proxies that choose among them", _compare),
    "repeat": Command("train one or two configs with several seeds, and compare them", _repeat),
    "tables": Command("train the missing cells of a table of the paper, or of a fair one, and print it", _tables),
    "estimate": Command("estimate the memory and time of a run before it starts", _estimate),
    "demo": Command("try a model in the browser, or write a Space", _demo),
    "export": Command("write a model as an ONNX file that takes images of any size", _export),
    "push": Command("publish a finished run on the Hub, with a model card", _push),
    "convert": Command("turn a released checkpoint into a folder for from_pretrained", _convert),
    "translator": Command(
        "train a translation network, compare engines, or translate source images",
        _translator,
        lambda args: args.action == "train",
    ),
    "config": Command("explain the keys of a config", _config),
    "env": Command("print versions and devices, for a bug report", _env),
    "completion": Command("print the script with which a shell completes subcommands and flags", _completion),
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
            "usage: t2sda COMMAND ...   (`t2sda COMMAND --help` explains a command)",
            "",
            "Adapt a semantic segmentation model to images that nobody has labelled.",
            "",
            *lines,
            "",
            "To start: t2sda train --config demo",
        ]
    )


def main(words: Sequence[str] | None = None, door: str = "t2sda") -> int:
    """Do what a command line says; the exit code.

    0; 2 when the input is at fault; 128 + number after a signal; 1 for what else ends a command. All but 0 come with
    one line that says why.

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
        if sys.flags.optimize > 1:
            raise ValueError(
                "python -OO (PYTHONOPTIMIZE=2) takes out the docstrings, which transformers reads. Use -O or nothing."
            )
        name, *rest = words
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            raise ValueError(f"unknown command {name!r}. {f'Did you mean {near[0]!r}?' if near else overview()}")
        parser = parser_of(name)
        args = parser.read(rest)
        args.door = door
        if name == "train" and args.continue_on:
            replay = 0.25 if args.replay is None else args.replay
            args.config, args.overrides = continued(args.config, args.continue_on, replay, args.overrides)
        elif name == "train" and args.replay is not None:
            raise ValueError("--replay is the share of the old targets, so it needs --continue_on with a further one.")
        if parser.takes_keys and name != "tables":  # whose files hold many runs
            args.cfgs = [
                load_config(path, args.overrides) for path in vars(args).get("configs", [vars(args).get("config")])
            ]
            args.cfg = args.cfgs[0]
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # of a launcher
            if not (value := os.environ.get(variable, "0")).isdecimal():
                raise ValueError(f"the environment has {variable}={value!r}, which must be a whole number: unset it.")
        if COMMANDS[name].launched(args):
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
        return _end(1, error)
    except KeyboardInterrupt:
        return _end(128 + signal.SIGINT, Stopped(signal.SIGINT, "what was finished before is kept"))
    except SystemExit as error:  # of argparse, after it printed a help
        return int(error.code or 0)


def _end(code: int, error: Exception | None) -> int:
    if error is not None:
        print(mask(f"{type(error).__name__}: {error}"), file=sys.stderr)
    return code


def _told_to_stop(number: int, frame: object) -> None:
    raise Stopped(number, "what was finished before is kept")


def entry() -> None:
    """The console script: `main` with a mask over all that the process prints, and a word after a signal."""
    # Before torch is loaded. Threads that wait by spinning make a step many times slower where others use the same
    # cores; large pages make large tensors in half the time on Linux.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for number in set(heard()) - {signal.SIGINT}:
        signal.signal(number, _told_to_stop)
    sys.exit(run_masked(main))

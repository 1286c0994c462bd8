"""The front of the command: words in, a namespace, one line and an exit code out; and what it starts."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from t2sda_hf import cli
from t2sda_hf.cli import COMMANDS, main, parser_of
from t2sda_hf.commands import env, evaluate, train
from t2sda_hf.config import RECIPES, RunConfig, keys, load_config
from t2sda_hf.errors import CheckpointError, Ended, NotFinite, RunFailed, Stopped

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy", "accelerate", "evaluate", "PIL", "cv2")
NEEDED = {  # words without which a command is not understood
    "prepare": ["source", "--output", "data"],
    "evaluate": ["model"],
    "predict": ["model", "photos", "--output", "out"],
    "analyze": ["model"],
    "repeat": ["demo"],
    "tables": ["table07"],
    "translator": ["train"],
}
TAKES_A_RUN = [name for name in COMMANDS if parser_of(name).takes_keys and name != "tables"]


def understood(name: str, *words: str) -> Namespace:
    return parser_of(name).read([*NEEDED.get(name, []), *words])


def as_read(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Namespace]:
    """What `run` of a command is called with, instead of calling it. One process, whatever this machine has."""
    seen: list[Namespace] = []
    monkeypatch.setattr(module, "run", lambda args: seen.append(args) or 0)
    monkeypatch.setattr("t2sda_hf.launching._num_gpus", lambda: 0)
    monkeypatch.setattr("t2sda_hf.launching._file_of_user", lambda: None)
    return seen


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher sets is not set, and what a test sets is gone after it."""
    for name in (
        "LOCAL_RANK",
        "RANK",
        "ACCELERATE_DYNAMO_BACKEND",
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_USE_CPU",
        "CUDA_VISIBLE_DEVICES",
        "T2SDA_COMMAND",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


# ------------------------------------------------------------------------------------------------- commands and help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_with_run_and_a_help_with_examples(name, capsys):
    module = importlib.import_module(f"t2sda_hf.commands.{name}")
    assert module.run.__annotations__["return"] is int
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: t2sda {name}")
    assert module.__doc__
    assert module.__doc__.split("\n")[0] in printed
    if name not in ("env",):
        assert f"t2sda {name}" in module.__doc__
    for line in re.findall(r"^ *t2sda (\w+)", module.__doc__, re.M):
        assert line in COMMANDS


def test_every_module_of_the_folder_is_a_command_or_serves_some():
    modules = {path.stem for path in (ROOT / "t2sda_hf" / "commands").glob("*.py")} - {"__init__"}
    assert modules == {*COMMANDS, "domains"}


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_without_a_word_all_commands_are_listed(words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", printed, re.M)


def test_the_list_of_recipes(capsys):
    assert main(["train", "--list"]) == 0
    assert "gta_cityscapes/t2sda_daformer" in capsys.readouterr().out.splitlines()


# ------------------------------------------------------------------------------------------------------------- words


def test_dashes_and_underscores_are_the_same():
    assert understood("check", "--pictures", "3").pictures == 3
    for flag in ("--no_labels", "--no-labels"):
        assert understood("analyze", flag).no_labels
    for flag in ("--image-size", "--image_size"):
        assert understood("predict", flag, "32", "64").image_size == [32, 64]
    for words in (["--optim.weight-decay", "0.5"], ["--optim.weight_decay=0.5"], ["--optim.weight-decay=0.5"]):
        assert load_config(None, understood("train", *words).overrides).optim.weight_decay == 0.5


@pytest.mark.parametrize("name", TAKES_A_RUN)
def test_a_key_is_a_flag_in_three_ways_in_every_command_that_takes_a_run(name):
    said = [["--set", "optim.lr=0.5"], ["--set=optim.lr=0.5"], ["--optim.lr", "0.5"], ["--optim.lr=0.5"]]
    found = [load_config(None, understood(name, *words).overrides) for words in said]
    assert all(one == found[0] for one in found)
    assert found[0].optim.lr == 0.5
    assert load_config(None, understood(name).overrides) == RunConfig()


def test_every_key_is_a_flag():
    for name, key in keys().items():
        value = yaml.safe_dump(key.default, default_flow_style=True).removesuffix("\n...\n").strip()
        assert load_config(None, understood("train", f"--{name}", value).overrides) == RunConfig()


def test_the_last_word_counts_and_flags_count_more_than_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1\nmethod: source_only\n")
    overrides = understood("train", "--seed", "2", "--set", "seed=3", "--seed=4").overrides
    cfg = load_config(tmp_path / "run.yaml", overrides)
    assert (cfg.seed, cfg.method) == (4, "source_only")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--classes", "road", "traffic light"], ("road", "traffic light")),
        (["--classes", "[road, traffic light]"], ("road", "traffic light")),
        (["--classes=[road, traffic light]"], ("road", "traffic light")),
        (["--classes", "road", "traffic, light"], ("road", "traffic, light")),
    ],
)
def test_a_list_is_several_words_or_yaml(words, expected):
    assert load_config(None, understood("train", *words).overrides).classes == expected


def test_lists_of_numbers_and_null():
    cfg = load_config(None, understood("train", "--data.crop_size", "64", "128", "--test.resize", "null").overrides)
    assert cfg.data.crop_size == (64, 128)
    assert cfg.test.resize is None


def test_a_section_is_a_flag_too():
    given = understood("train", "--train", "{max_steps: 7, log_every: 3}", "--model={size: mit_b1}").overrides
    cfg = load_config(None, given)
    assert (cfg.train.max_steps, cfg.train.log_every, cfg.model.size) == (7, 3, "mit_b1")


@pytest.mark.parametrize(
    "name", [name for name in TAKES_A_RUN if "--split" in parser_of(name).format_usage() and name != "prepare"]
)
def test_keys_of_the_test_domain_are_flags_without_its_name(name):
    words = ["--split", "train", "--label_map", "{human: person}", "--crop-box", "0", "0", "40", "64"]
    test = load_config(None, understood(name, *words).overrides).test
    assert (test.split, test.label_map, test.crop_box) == ("train", {"human": "person"}, (0, 0, 40, 64))


def test_a_config_may_be_named_or_a_path_and_several_are_read_in_order(monkeypatch):
    repeat = importlib.import_module("t2sda_hf.commands.repeat")
    seen = as_read(monkeypatch, repeat)
    assert main(["repeat", "demo", str(RECIPES / "camvid" / "t2sda.yaml"), "--seeds", "0..1", "--optim.lr=0.5"]) == 0
    assert [cfg.output_dir for cfg in seen[0].cfgs] == [load_config(one).output_dir for one in ("demo", "camvid/t2sda")]
    assert {cfg.optim.lr for cfg in seen[0].cfgs} == {0.5}
    assert seen[0].cfg == seen[0].cfgs[0]


@pytest.mark.parametrize(("text", "seeds"), [("0..3", [0, 1, 2, 3]), ("0,3,7", [0, 3, 7]), ("5", [5])])
def test_seeds_are_a_range_or_a_list(text, seeds):
    for name in ("repeat", "tables"):
        assert understood(name, "--seeds", text).seeds == seeds


@pytest.mark.parametrize("text", ["3..0", "0,0", "-1", "two", "", "1..x", "0..1000000000000"])
def test_seeds_that_are_none_are_refused(text):
    with pytest.raises(
        ValueError, match=r"--seeds.* takes a range like 0\.\.4 or a list like 0,3,7 of different seeds"
    ):
        understood("repeat", "--seeds", text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["xyzzy"], "unknown command 'xyzzy'. usage: t2sda COMMAND"),
        (["train", "--dry_runn"], "unknown flag --dry_runn. Did you mean --dry-run?"),
        (["train", "--optim.lrr", "1"], "unknown key 'optim.lrr' in the command line. Did you mean 'optim.lr'?"),
        (["train", "--set", "optim.lrr=1"], "unknown key 'optim.lrr' in the command line. Did you mean 'optim.lr'?"),
        (["train", "--set", "optim.lr"], "--set takes KEY=VALUE, got 'optim.lr'."),
        (["train", "--lr", "1"], "unknown key 'lr' in the command line. Did you mean 'optim.lr'?"),
        (["train", "--optim.lr"], "--optim.lr needs a value."),
        (["train", "--optim.lr", "fast"], "optim.lr in the command line must be a number, got 'fast'."),
        (["train", "--model", "3"], "model in the command line is a section"),
        (["train", "--config", "dmeo"], "config file 'dmeo' does not exist."),
        (["train", "--config", "dmeo"], "Did you mean 'demo'?"),
        (["train", "words"], "unrecognized arguments: words"),
        (["train", "--num_processes", "0"], "--num_processes must be at least 1, got 0."),
        (["train", "--num_processes", "two"], "argument --num_processes: invalid int value: 'two'"),
        (["evaluate", "m", "--splitt", "x"], "unknown flag --splitt. Did you mean --split?"),
        (["evaluate"], "the following arguments are required: [TITLE=]MODEL"),
        (["env", "--verbose"], "unknown flag --verbose. See `t2sda env --help`."),
        (["prepare", "gta", "--root", "a", "--output", "b"], "invalid choice: 'gta'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_word_that_is_not_understood_is_one_sentence_and_code_2(words, message, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("ValueError: ")
    assert message in printed.err
    assert printed.out == ""


# ------------------------------------------------------------------------------------------------- how a command ends


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (ValueError("the input."), 2, "ValueError: the input.\n"),
        (Ended("over."), 1, "Ended: over.\n"),
        (CheckpointError("no space."), 1, "CheckpointError: no space.\n"),
        (RunFailed("the disk."), 1, "RunFailed: the disk.\n"),
        (Stopped(signal.SIGTERM), 143, "Stopped: by SIGTERM.\n"),
        (Stopped(signal.SIGHUP, "all is kept"), 129, "Stopped: by SIGHUP; all is kept.\n"),
        (OSError(28, "No space left on device"), 1, "OSError: [Errno 28] No space left on device\n"),
        (NotFinite("nan."), 1, "NotFinite: nan.\n"),
        (KeyboardInterrupt(), 130, "Stopped: by SIGINT; what was finished before is kept.\n"),
        (BrokenPipeError("worker"), 1, "BrokenPipeError: worker\n"),
        (ValueError("a token hf_" + "Q" * 34), 2, "ValueError: a token <masked>\n"),
    ],
    ids=repr,
)
def test_an_error_is_one_line_and_an_exit_code(raised, code, said, monkeypatch, capsys):
    def run(args):
        raise raised

    monkeypatch.setattr(env, "run", run)
    assert main(["env"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_nobody_can_take_ends_no_command_with_a_traceback() -> None:
    """A reader that is gone is no error; a full disk is one."""
    command = [sys.executable, "-m", "t2sda_hf", "config"]
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        lost = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert lost.returncode == 1
    assert lost.stderr == "OSError: what the command prints could not be written: [Errno 28] No space left on device\n"


def test_no_name_is_worth_an_end_because_of_its_letters() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "t2sda_hf", "config", "straße"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "stra\\xdfe" in done.stderr


def test_python_without_docstrings_is_refused_at_once() -> None:
    done = subprocess.run([sys.executable, "-OO", "-m", "t2sda_hf", "env"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ValueError: python -OO")
    assert len(done.stderr.splitlines()) == 1


def test_what_run_returns_is_the_exit_code_and_other_errors_come_through(monkeypatch):
    monkeypatch.setattr(env, "run", lambda args: 1)
    assert main(["env"]) == 1
    monkeypatch.setattr(env, "run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["env"])


def test_of_several_processes_the_first_says_it_unless_only_one_knows(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    for raised, said in ((Ended("over."), ""), (RunFailed("mine."), "RunFailed: mine.\n")):

        def run(args, raised=raised):
            raise raised

        monkeypatch.setattr(env, "run", run)
        assert main(["env"]) == 1
        assert capsys.readouterr().err == said


LIGHT = [
    *(([name, "--help"], 0) for name in COMMANDS),
    (["train", "--list"], 0),
    (["train", "--config", "demo", "--optim.lrr", "1"], 2),
    (["train", "--config", "demo", "--optim.lr", "-1"], 2),
    (["evaluate", "model", "--config", "nowhere"], 2),
    (["completion", "fish"], 2),
]


@pytest.fixture(scope="module")
def loaded_by() -> list[tuple[int, list[str]]]:
    """Exit code of each of these, one after the other in a process, and what it loaded that the others did not."""
    code = """
import json, sys
from t2sda_hf.cli import main
for words in json.loads(sys.argv[1]):
    before, printed, sys.stdout = set(sys.modules), sys.stdout, sys.stderr
    code = main(words)
    sys.stdout = printed
    print(json.dumps([code, sorted(set(sys.modules) - before)]))
"""
    words = json.dumps([words for words, _ in LIGHT])
    done = subprocess.run(
        [sys.executable, "-c", code, words], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("place", range(len(LIGHT)), ids=[" ".join(words) for words, _ in LIGHT])
def test_help_and_refusals_load_no_library_that_takes_seconds(loaded_by, place):
    code, loaded = loaded_by[place]
    assert code == LIGHT[place][1]
    assert [name for name in HEAVY if name in loaded] == []


def test_a_start_loads_no_library_that_takes_seconds():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "t2sda_hf"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    loaded = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.M))
    assert done.returncode == 0, done.stderr[-1000:]
    assert "t2sda_hf.cli" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_a_recipe_is_read_without_them_too():
    assert (
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, t2sda_hf.config as c; c.load_config('demo'); print('torch' in sys.modules)",
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        ).stdout
        == "False\n"
    )


# --------------------------------------------------------------------------------------------------------- launching


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Namespace]:
    """What accelerate would start. Nobody works in this process: that would be an error."""
    seen: list[Namespace] = []

    def launch_command(asked: Namespace) -> None:
        asked.command = os.environ["T2SDA_COMMAND"]  # for the record of the run
        seen.append(asked)

    monkeypatch.setattr(accelerate_launch, "launch_command", launch_command)
    monkeypatch.setattr("t2sda_hf.launching._file_of_user", lambda: None)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "run", lambda args: pytest.fail("this process was to start others"))
    return seen


def test_commands_that_train_or_score_take_the_flags_of_a_launcher():
    assert {name for name in COMMANDS if "--accelerate_config" in parser_of(name).format_usage()} == {
        *("train", "evaluate", "repeat", "tables", "translator")
    }


def test_one_process_is_this_one(monkeypatch):
    seen = as_read(monkeypatch, train)
    assert main(["train", "--config", "demo"]) == 0
    assert main(["train", "--config", "demo", "--num_processes", "1", "--cpu", "--mixed_precision", "no"]) == 0
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    assert [args.cfg for args in seen] == [load_config("demo")] * 2


def test_several_processes_are_started_as_accelerate_does(started):
    words = ["--config", "demo", "--num-processes", "2", "--optim.lr=0.5", "--cpu", "--dry-run"]
    assert main(["train", *words]) == 0
    asked = started[0]
    assert (asked.num_processes, asked.multi_gpu, asked.config_file) == (2, True, None)
    assert (asked.module, asked.training_script) == (True, "t2sda_hf")
    assert asked.training_script_args == ["train", "--config", "demo", "--optim.lr=0.5", "--dry-run"]
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    assert asked.command == "t2sda train --config demo --num_processes 2 --optim.lr=0.5 --cpu --dry-run"
    assert "T2SDA_COMMAND" not in os.environ


def test_a_launch_file_is_named_or_a_path(started, tmp_path):
    shipped = RECIPES / "accelerate" / "multi_node.yaml"
    more = ["--machine_rank=1", "--main_process_ip", "10.0.0.1", "--mixed_precision", "bf16", "--num_processes", "4"]
    for given in ("multi_node", str(shipped)):
        assert main(["evaluate", "model", "--accelerate_config", given, *more, "--config", "demo"]) == 0
    for asked in started:
        assert asked.config_file == str(shipped)
        assert (asked.machine_rank, asked.main_process_ip) == (1, "10.0.0.1")
        assert (asked.mixed_precision, asked.num_processes) == ("bf16", 4)
        assert asked.training_script_args == ["evaluate", "model", "--config", "demo"]


def test_an_unknown_launch_file_is_refused_with_the_names(started, capsys):
    assert main(["train", "--config", "demo", "--accelerate_config", "multi_gpus"]) == 2
    assert "single_gpu" in (said := capsys.readouterr().err)
    assert "Did you mean 'multi_gpu'?" in said
    assert started == []


def test_several_gpus_or_a_config_of_the_user_start_as_many(started, monkeypatch):
    monkeypatch.setattr("t2sda_hf.launching._num_gpus", lambda: 3)
    assert main(["train", "--config", "demo"]) == 0
    assert (started[0].num_processes, started[0].multi_gpu) == (3, True)
    own = RECIPES / "accelerate" / "multi_gpu.yaml"
    monkeypatch.setattr("t2sda_hf.launching._file_of_user", lambda: own)  # what `accelerate config` has written
    assert main(["train", "--config", "demo"]) == 0
    # Nothing that the file says is overridden.
    assert (started[1].config_file, started[1].num_processes, started[1].mixed_precision) == (str(own), None, None)


def test_one_process_of_a_launch_file_is_this_one(monkeypatch, tmp_path):
    """Or a signal would end the launcher, and leave the run alone."""
    seen = as_read(monkeypatch, train)
    file = tmp_path / "one.yaml"
    text = (RECIPES / "accelerate" / "single_gpu.yaml").read_text(encoding="utf-8")
    changed = text.replace("mixed_precision: 'no'", "mixed_precision: bf16").replace("'NO'", "INDUCTOR", 2)
    file.write_text(changed.replace("INDUCTOR", "'NO'", 1) + "gpu_ids: '1'\n", encoding="utf-8")
    assert main(["train", "--config", "demo", "--accelerate_config", str(file)]) == 0
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["ACCELERATE_DYNAMO_BACKEND"].endswith("INDUCTOR")  # nothing that it says is dropped
    assert len(seen) == 1


def test_another_door_is_a_launchers_business(started, capsys):
    words = ["train", "--config", "demo", "--num_processes", "2"]
    assert main(words, door="scripts/train_uda.py") == 2
    assert "give --num_processes=2 to that" in capsys.readouterr().err
    assert started == []


def test_what_is_wrong_with_a_config_is_said_before_anything_is_started(started, capsys):
    assert main(["train", "--config", "demo", "--num_processes", "2", "--optim.lr", "-1"]) == 2
    assert "optim.lr must be" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "ACCELERATE_DYNAMO_BACKEND"])
def test_a_started_process_starts_none_and_refuses_flags_of_a_launcher(variable, started, monkeypatch, capsys):
    monkeypatch.setenv(variable, "0" if variable == "LOCAL_RANK" else "no")
    assert main(["train", "--config", "demo", "--num_processes", "2", "--cpu"]) == 2
    assert "give --num_processes=2 --cpu to that, not to t2sda train" in capsys.readouterr().err
    seen = as_read(monkeypatch, train)
    assert main(["train", "--config", "demo"]) == 0
    assert len(seen) == 1
    assert started == []


def child(exitcode: int) -> ChildFailedError:
    return ChildFailedError("t2sda_hf", {0: ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="none")})


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (subprocess.CalledProcessError(2, "t2sda"), 2),
        (subprocess.CalledProcessError(143, "t2sda"), 143),
        (subprocess.CalledProcessError(-signal.SIGKILL, "t2sda"), 137),
        (child(1), 1),
        (child(130), 130),
        (child(-signal.SIGSEGV), 139),
        (SignalException("told to", signal.SIGTERM), 143),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_exit_codes_of_children_are_passed_on(raised, code, monkeypatch):
    def launch_command(asked):
        raise raised

    monkeypatch.setattr(accelerate_launch, "launch_command", launch_command)
    assert main(["train", "--config", "demo", "--num_processes", "2"]) == code


@pytest.mark.two_processes
def test_two_real_processes_end_with_the_code_of_their_refusal(tmp_path):
    words = ["train", "--config", "demo", "--num_processes", "2", "--cpu", "--source.path", str(tmp_path / "nowhere")]
    done = subprocess.run(
        [sys.executable, "-m", "t2sda_hf", *words, "--output_dir", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "nowhere" in re.search(r"^ValueError: (.*)$", done.stderr, re.M)[1]
    assert not (tmp_path / "out").exists()


def test_entry_masks_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["t2sda", "env"])
    monkeypatch.setattr(env, "run", lambda args: print("hf_" + "Q" * 34) or 3)
    for stream in ("stdout", "stderr"):  # comes back after the test
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    with pytest.raises(SystemExit) as ended:
        cli.entry()
    assert ended.value.code == 3
    assert capsys.readouterr().out == "<masked>\n"


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    """Where the shell does not replace it: after "=", in quotes, and in the arguments of a launcher."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["mine=~/model", "~/other", "a=b/~c", "--output=~/scores.json", "--domain", "~/test", "--test.path", "~/x"]
    args = cli.parser_of("evaluate").read([*words, "--set", "source.path=~/y"])
    assert args.models == [f"mine={tmp_path}/model", f"{tmp_path}/other", "a=b/~c"]
    assert (str(args.output), args.domain) == (f"{tmp_path}/scores.json", [f"{tmp_path}/test"])
    config = load_config(None, args.overrides)
    assert (config.test.path, config.source.path) == (f"{tmp_path}/x", f"{tmp_path}/y")


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_a_variable_of_a_launcher_that_is_no_number_is_named(variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "x")
    assert main(["env"]) == 2
    assert f"the environment has {variable}='x', which must be a whole number" in capsys.readouterr().err


def test_a_training_of_nothing_says_so(capsys):
    assert main(["train", "--seed", "1"]) == 2
    assert "there is nothing to train: give --config" in capsys.readouterr().err

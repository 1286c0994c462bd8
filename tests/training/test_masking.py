"""Every command of scripts/: a secret that it is given comes out nowhere, however the command ends."""

import logging
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts").glob("*.py"))
CANARY, SECRET = "hf_CANARYcanary0123456789CANARY", "correct-horse-battery"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hub_token", CANARY, f"https://anna:{SECRET}@example.org/x"],
        [f"no such folder/{CANARY}"],
        [f"no such folder/{CANARY}", "--domain", f"no such folder/{SECRET}", "--output", "out", "--to", "camvid"],
        ["--config", f"no such folder/{CANARY}.yaml"],
    ],
    ids=["unknown flag", "folder", "folder and domain", "config"],
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_canary_comes_out_of_no_command(
    script: Path,
    arguments: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.name, *arguments])
    for stream in ("stdout", "stderr"):  # comes back after the test
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    make_record = logging.getLogRecordFactory()
    code: object = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # what the interpreter does with it
        traceback.print_exc()
    finally:
        logging.setLogRecordFactory(make_record)
    printed = capfd.readouterr()
    assert code != 0
    assert printed.err
    for word in (CANARY, SECRET):
        assert word not in printed.out + printed.err
        names_and_contents = [str(path.relative_to(tmp_path)).encode() for path in tmp_path.rglob("*")]
        names_and_contents += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(word.encode() in text for text in names_and_contents)


def test_what_a_command_prints_logs_and_dies_of_is_masked() -> None:
    """Also by a handler that took the stream before, and by a logger with a traceback."""
    code = f"""
import logging, sys
from t2sda_hf.training.masking import run_masked
logging.basicConfig(level=0)
def main():
    print("a {CANARY} b"); sys.stderr.write("c {CANARY} d\\n"); logging.info("e %s f", "{CANARY}")
    raise RuntimeError("g {CANARY} h")
run_masked(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "a <masked> b\n"
    for text in ("c <masked> d", "e <masked> f", "RuntimeError: g <masked> h", "Traceback"):
        assert text in done.stderr
    assert CANARY not in done.stdout + done.stderr.replace(code, "")

"""A secret comes out nowhere: of no command, however it ends, and of no file that is published."""

import logging
import re
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from t2sda_hf.cli import COMMANDS
from t2sda_hf.hub.push import refuse_secrets
from t2sda_hf.masking import _IN_TEXT, _KEYS, mask

SCRIPTS = {path.name: path for path in sorted((Path(__file__).parents[1] / "scripts").glob("*.py"))}
CANARY, SECRET = "hf_CANARYcanary0123456789CANARY", "correct-horse-battery"
# Made up; cut in two, so that nobody who looks for secrets finds them here. What must go is the second part.
FORMS = {
    "Hugging Face": ("hf_", "Q" * 34),
    "Hugging Face, organisation": ("api_org_", "Q" * 34),
    "glued by an underscore": ("MY_TOKEN_hf_", "Q" * 34),
    "GitHub, personal": ("ghp_", "q1W2" * 9),
    "GitHub, app": ("ghs_", "q1W2" * 9),
    "GitHub, fine-grained": ("github_pat_", "11ABCDEFG0_" + "q1W2" * 15),
    "GitLab": ("glpat-", "q1W2-e3R4_t5Z6u7I8o9"),
    "OpenAI": ("sk-", "q1W2" * 12),
    "OpenAI, of a project": ("sk-proj-", "q1W2_" * 12),
    "Slack, bot": ("xoxb-", "123456789012-1234567890123-q1W2e3R4t5Z6"),
    "Slack, person": ("xoxp-", "123456789012-1234567890123-q1W2e3R4t5Z6"),
    "AWS": ("AKIA", "Q1W2" * 4),
    "URL": ("https://anna:", "hunter-22!"),
    "header": ("authorization: bearer ", "q1W2.e3R4.t5Z6"),
}


@pytest.mark.parametrize(("start", "secret"), FORMS.values(), ids=FORMS)
def test_every_form_is_masked_and_stops_a_push(start: str, secret: str, tmp_path: Path) -> None:
    text = f"before {start}{secret}@example.org after"
    assert secret not in mask(text)
    assert mask(text).startswith("before ")
    assert mask(text).endswith("@example.org after")
    for content in (text.encode(), b"\0\xff" + text.encode() + b"\xfe\0"):
        (tmp_path / "weights.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.bin holds what looks like") as raised:
            refuse_secrets(tmp_path)
        assert secret not in str(raised.value)


def test_every_form_has_an_example_here() -> None:
    examples = ["".join(pair) + "@example.org" for pair in FORMS.values()]
    starts = [start for letters in _KEYS.values() for start in letters]
    assert [start for start in starts if not any(re.match(start, text) for text in examples)] == []
    assert [form.pattern for form in _IN_TEXT if not any(form.search(text) for text in examples)] == []


def test_a_secret_of_the_environment_stops_a_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    (tmp_path / "notes.md").write_text(f"see {SECRET}.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes\.md holds") as raised:
        refuse_secrets(tmp_path)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "from huggingface_hub import hf_hub_download",
        "a mask-and-risk-assessment-of-the-task-at-hand",
        'f"Bearer {token}" and https://example.org:8080/a@b',
        '"pad_token": "<|endoftext|>"',
    ],
)
def test_code_and_plain_words_are_published(text: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(text, encoding="utf-8")
    refuse_secrets(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hub_token", CANARY, f"https://anna:{SECRET}@example.org/x"],
        [f"no such folder/{CANARY}"],
        [f"no such folder/{CANARY}", "--domain", f"no such folder/{SECRET}", "--output", "out"],
        ["--config", f"no such folder/{CANARY}.yaml"],
    ],
    ids=["unknown flag", "folder", "folder and domain", "config"],
)
@pytest.mark.parametrize("command", [*COMMANDS, *SCRIPTS])
def test_a_canary_comes_out_of_no_command(
    command: str,
    arguments: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command, *arguments] if command in SCRIPTS else ["t2sda", command, *arguments])
    for stream in ("stdout", "stderr"):  # comes back after the test
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    make_record = logging.getLogRecordFactory()
    code: object = 1
    try:
        if command in SCRIPTS:
            runpy.run_path(str(SCRIPTS[command]), run_name="__main__")
        else:
            runpy.run_module("t2sda_hf", run_name="__main__")
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
from t2sda_hf.masking import run_masked
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

"""A sample of the fault campaign, and what is forbidden in the package so that no file can run code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_sample_of_every_fault_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own: it forks a child per run, and those must not inherit pytest's threads and handlers."""
    command = [sys.executable, str(ROOT / "tests" / "faults" / "campaign.py"), "--sample"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    table = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    name, *numbers = table[-1]
    tried, survived, lost, mixed, silent = map(int, numbers)
    assert name == "all"
    assert tried == survived > 70
    assert lost == mixed == silent == 0
    assert len({row[0] for row in table}) > 12


@pytest.mark.parametrize(
    "forbidden",
    [
        r"pickle\.loads?\(|Unpickler\(",
        r"torch\.load\((?![^\n]*weights_only=True)",
        r"weights_only\s*=\s*False",
        r"trust_remote_code\s*=\s*True",
        r"(?<![.\w])(?:eval|exec)\(",
        r"yaml\.(?:load|unsafe_load|full_load)\(",
        r"allow_pickle\s*=\s*True",
        r"shell\s*=\s*True",
    ],
)
def test_nothing_that_runs_what_a_file_says_is_in_the_package(forbidden: str) -> None:
    hits = []
    for path in [*(ROOT / "t2sda_hf").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        hits += [f"{path.relative_to(ROOT)}: {match.group()}" for match in re.finditer(forbidden, code)]
    assert not hits

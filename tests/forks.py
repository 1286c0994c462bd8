"""Run by running.py: commands in forks of one process, which has imported everything once.

An import takes several times as long as a tiny run; so do the pictures and charts of a training, which are left out. A
request is a line of JSON: the folder for what is printed, and for each process its words (as behind `python`) and its
environment. The answer is the list of the exit codes.
"""

import json
import os
import runpy
import signal
import sys

import pytest
import transformers.models.segformer.modeling_segformer  # noqa: F401 - it is imported when it is asked for
from running import undrawn

import t2sda_hf.commands.evaluate
import t2sda_hf.commands.predict  # noqa: F401

PATIENCE = 300  # seconds


def begun() -> list[str]:
    """Serve until the input ends. A child comes back from here with its words, as itself."""
    for line in sys.stdin:
        request, codes = json.loads(line), {}
        for rank, (words, environment) in enumerate(request["processes"]):
            child = os.fork()
            if not child:
                signal.alarm(PATIENCE)
                for number, name in enumerate((os.devnull, "out", "err")):
                    path = os.path.join(request["folder"], f"{name}{rank}") if number else name
                    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
                os.environ.clear()
                os.environ.update(environment)
                return words
            codes[child] = None
        while None in codes.values():
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:  # the others would wait for it
                for other in (other for other, code in codes.items() if code is None):
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(list(codes.values())), flush=True)
    sys.exit()


if __name__ == "__main__":
    undrawn(pytest.MonkeyPatch())
    words = begun()
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(words[0]))
        runpy.run_path(words[0], run_name="__main__")

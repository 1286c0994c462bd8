"""Set before torch is loaded: threads that wait by spinning make tests many times slower on a shared machine, and
several threads for tensors of a few numbers cost half as much again: `make test` has a process for each core. And all
tests are of the CPU, also where there is a GPU: they compare bits, and some make a stand-in for a GPU themselves."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """What a run derives from its machine is the same on every one: nobody loads data ahead."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)

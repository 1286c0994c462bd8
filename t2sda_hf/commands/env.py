"""Print what a bug report needs: versions, devices, threads, and the folders of the caches."""

import os
import platform
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version

import torch
from huggingface_hub import constants

from ..config import RECIPES
from ..hub.card import cpu_name

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "safetensors", "pydantic")
EXTRAS = ("scikit-learn", "gradio", "onnx", "onnxruntime", "av", "peft")


def run(args: Namespace) -> int:
    for name, value in facts().items():
        print(f"- {name}: {value}")
    return 0


def facts() -> dict[str, str]:
    """Name -> value, in the order of the report."""
    found = {"t2sda_hf": version("t2sda_hf"), "Python": platform.python_version(), "system": platform.platform()}
    found |= {name: _version(name) for name in PACKAGES}
    found |= {name: known for name in EXTRAS if (known := _version(name)) != "not installed"}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found["GPUs"] = ", ".join(devices) or "none"
    found["CUDA"] = torch.version.cuda or "none: torch is a CPU build"
    found["CPU"] = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    settings = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
    found["settings"] = " ".join(f"{name}={os.environ[name]}" for name in settings if name in os.environ) or "none"
    return found | {"HF_HOME": constants.HF_HOME, "recipes": str(RECIPES)}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

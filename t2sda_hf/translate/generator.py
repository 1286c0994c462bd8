"""The network that `t2sda translator train` trains, and how a translator is kept in a folder."""

import importlib
import json
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..listing import refuse_pointers
from ..storage import share_weights

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class TranslationGenerator(nn.Module):
    """A CycleGAN generator (Zhu et al. 2017): two steps down, residual blocks, two steps up, instance norm.

    It predicts a change that is added to the image, and starts with no change at all: so it begins at a translation
    that keeps every pixel's class, and a short training cannot lose it. Upsampling is nearest neighbour before a
    convolution, which leaves no checkerboard.
    """

    def __init__(self, width: int = 32, num_blocks: int = 4) -> None:
        """`width` channels at full resolution, four times as many in the `num_blocks` residual blocks.

        Raises:
            ValueError: for numbers with which no translator was ever made: building it would take hours, or all memory.
        """
        super().__init__()
        for name, value, most in (("width", width, 1024), ("num_blocks", num_blocks, 64)):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value}")
        self.into = nn.Sequential(
            *_block(3, width, 7), *_block(width, 2 * width, 3, stride=2), *_block(2 * width, 4 * width, 3, stride=2)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*_block(4 * width, 4 * width, 3), *_block(4 * width, 4 * width, 3)[:-1])
            for _ in range(num_blocks)
        )
        self.out = nn.Sequential(
            nn.Upsample(scale_factor=2),
            *_block(4 * width, 2 * width, 3),
            nn.Upsample(scale_factor=2),
            *_block(2 * width, width, 3),
        )
        self.change = nn.Conv2d(width, 3, 7, padding=3, padding_mode="reflect")
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,3,H,W), near [0,1]. Any size from 16 x 16."""
        height, width = images.shape[-2:]
        below, right = -height % 4, -width % 4
        features = self.into(F.pad(images * 2 - 1, (0, right, 0, below), mode="reflect"))
        for block in self.blocks:
            features = features + block(features)
        return images + self.change(self.out(features)).tanh()[..., :height, :width]


def _block(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(
        channels_in, channels_out, kernel, stride, padding=kernel // 2, padding_mode="reflect", bias=False
    )
    return [convolution, nn.InstanceNorm2d(channels_out, affine=True), nn.ReLU()]


def save_translator(folder: Path, translator: nn.Module, arguments: dict[str, Any]) -> None:
    """Write weights, and the `arguments` that the class was made with, for `load_translator`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(arguments, indent=2), encoding="utf-8")
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in translator.state_dict().items()}, folder / WEIGHTS_FILE
    )
    share_weights(folder)


def load_translator(location: str, architecture: str) -> nn.Module:
    """Any nn.Module (B,3,H,W) in [0,1] -> the same, in eval mode and without gradients.

    Args:
        location: a folder, or a repository of the Hub, with config.json (arguments of the class) and
            model.safetensors (its state_dict).
        architecture: "package.module:Class", a class of nn.Module in an installed package.

    Raises:
        ValueError: if the class or a file is not there, or a tensor is missing, unknown or of another shape.
    """
    made_by = _module_class(architecture)
    refuse_pointers(Path(location))
    config = local_file(location, CONFIG_FILE)
    weights = local_file(location, WEIGHTS_FILE)
    missing = [name for name, path in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)) if path is None]
    if config is None or weights is None:
        raise ValueError(
            f"translate.trained.model: no {' and no '.join(missing)} in {location!r}, which must be a folder or a "
            "repository of the Hub. `t2sda translator train` writes such a folder."
        )
    try:
        translator = made_by(**json.loads(config.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config} does not hold the arguments of {architecture}: {error}.") from error
    load_tensors(translator, load_file(weights), str(weights))
    return translator.requires_grad_(False).eval()


def _module_class(architecture: str) -> type[nn.Module]:
    """The class that is named, which must be one of `nn.Module` in an installed package: nothing else is imported."""
    module_name, _, class_name = architecture.partition(":")
    package, found = module_name.partition(".")[0], None
    problem = f"no installed package has a module {package!r}"
    if package == __name__.partition(".")[0] or package in packages_distributions():
        try:
            found = getattr(importlib.import_module(module_name), class_name)
            problem = f"{class_name!r} is not such a class"
        except (ImportError, AttributeError, ValueError) as error:
            problem = str(error)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"translate.trained.architecture must be package.module:Class, a torch.nn.Module of an installed package, "
            f"got {architecture!r}: {problem}."
        )
    return found


def local_file(location: str, name: str) -> Path | None:
    """A file of a folder or of a Hub repository, downloaded if need be; None if it is not to be had."""
    folder = Path(location)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(location, name))
    except (OSError, ValueError, EntryNotFoundError):  # no such repository or file, no network, or no repository's name
        return None


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Strict loading, with the names in one line.

    Raises:
        ValueError: see `load_translator`.
    """
    own = module.state_dict()
    faults = [f"no {name}" for name in own if name not in tensors]
    faults += [f"unknown {name}" for name in tensors if name not in own]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, wanted {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{where} does not fit {type(module).__name__}: {'; '.join(faults[:3])}{more}.")
    module.load_state_dict(tensors)

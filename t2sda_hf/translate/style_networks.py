"""The two style networks of domain generalisation, so that their public weights load (method 5.12 B and C).

Layer names are those of the public files; the arithmetic is that of the papers: AdaIN (Huang and Belongie 2017), and
style augmentation (Jackson et al. 2019) with the transformer of Ghiasi et al. 2017.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from .generator import load_tensors, local_file

ADAIN_FILES = ("vgg_normalised", "decoder")
RANDOMIZATION_FILES = ("checkpoint_transformer", "checkpoint_stylepredictor", "checkpoint_embeddings")
EMBEDDING_SIZE = 100  # of Ghiasi's style embeddings


def find_weights(location: str, names: tuple[str, ...]) -> dict[str, Path]:
    """NAME.safetensors or NAME.pth for every name, in a folder or a Hub repository; those that are not there lack."""
    found: dict[str, Path] = {}
    for name in names:
        path = local_file(location, f"{name}.safetensors") or local_file(location, f"{name}.pth")
        if path is not None:
            found[name] = path
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    content: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in content.items():
        if name.startswith("state_dict") and isinstance(value, dict):
            return value
    return content


# --- AdaIN -----------------------------------------------------------------------------------------------------------

_VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512)  # VGG-19 up to relu4_1
_DECODER = (256, "up", 256, 256, 256, 128, "up", 128, 64, "up", 64, 3)  # the same backwards


class AdaIN(nn.Module):
    """Content of one image, mean and deviation of VGG features of another."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 3, 1), *_convolutions(3, _VGG))
        self.decoder = nn.Sequential(*_convolutions(512, _DECODER)[:-1])  # the last one has no ReLU

    @classmethod
    def load(cls, files: dict[str, Path]) -> "AdaIN":
        network = cls()
        names = network.encoder.state_dict()
        encoder = {name: value for name, value in _tensors(files["vgg_normalised"]).items() if name in names}
        load_tensors(network.encoder, encoder, str(files["vgg_normalised"]))  # the public file goes on to relu5_4
        load_tensors(network.decoder, _tensors(files["decoder"]), str(files["decoder"]))
        return network.requires_grad_(False).eval()

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """(B,3,H,W) and (B,3,h,w) in [0,1] -> (B,3,H,W), near [0,1]."""
        height, width = content.shape[-2:]
        content = F.pad(content, (0, -width % 8, 0, -height % 8), mode="replicate")
        features, wanted = self.encoder(content), self.encoder(style)
        deviations = [(map.var((2, 3), keepdim=True) + 1e-5).sqrt() for map in (features, wanted)]
        means = [map.mean((2, 3), keepdim=True) for map in (features, wanted)]
        stylised: Tensor = self.decoder((features - means[0]) / deviations[0] * deviations[1] + means[1])
        return stylised[..., :height, :width]


def _convolutions(channels: int, plan: tuple[int | str, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for step in plan:
        if step == "pool":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        elif step == "up":
            layers.append(nn.Upsample(scale_factor=2))
        else:
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, int(step), 3), nn.ReLU()]
            channels = int(step)
    return layers


# --- style randomisation ---------------------------------------------------------------------------------------------


class StyleRandomizer(nn.Module):
    """Ghiasi's transformer under the embedding α·z + (1-α)·style(x), with z of the distribution of paintings."""

    mean: Tensor  # (100,)
    root: Tensor  # (100,100), root·rootᵀ = the covariance

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.predictor = _Transformer(), _StylePredictor()
        self.register_buffer("mean", torch.zeros(EMBEDDING_SIZE))
        self.register_buffer("root", torch.eye(EMBEDDING_SIZE))

    @classmethod
    def load(cls, files: dict[str, Path]) -> "StyleRandomizer":
        network = cls()
        transformer, predictor, embeddings = (_tensors(files[name]) for name in RANDOMIZATION_FILES)
        load_tensors(network.transformer, transformer, str(files[RANDOMIZATION_FILES[0]]))
        counters = {name: value for name, value in network.predictor.state_dict().items() if "num_batches" in name}
        load_tensors(network.predictor, counters | predictor, str(files[RANDOMIZATION_FILES[1]]))
        network.mean = embeddings["pbn_embedding_mean"].float()
        vectors, values, _ = torch.linalg.svd(embeddings["pbn_embedding_covariance"].double())
        network.root = (vectors * values.sqrt()).float()
        return network.requires_grad_(False).eval()

    def forward(self, images: Tensor, share: float, generator: Generator) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,3,H,W) in [0,1]; `share` is α."""
        height, width = images.shape[-2:]
        drawn = torch.randn(len(images), EMBEDDING_SIZE, generator=generator).to(images.device)
        embedding = share * (drawn @ self.root.T + self.mean) + (1 - share) * self.predictor(images)
        images = F.pad(images, (0, -width % 4, 0, -height % 4), mode="replicate")
        return torch.sigmoid(self.transformer(images, embedding))[..., :height, :width]


class _Convolution(nn.Module):
    """Convolution and instance norm; scale and shift come from the style where there is one."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, styled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride)
        if styled:
            self.fc_beta = nn.Linear(EMBEDDING_SIZE, channels_out)
            self.fc_gamma = nn.Linear(EMBEDDING_SIZE, channels_out)

    def forward(self, maps: Tensor, style: Tensor | None = None) -> Tensor:
        half = self.conv.kernel_size[0] // 2
        maps = F.instance_norm(self.conv(F.pad(maps, (half,) * 4, mode="reflect")))
        if style is None:
            return maps
        return self.fc_gamma(style)[..., None, None] * maps + self.fc_beta(style)[..., None, None]


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        for number in (1, 2):
            self.add_module(f"conv{number}", nn.Conv2d(channels, channels, 3))
            self.add_module(f"fc_beta{number}", nn.Linear(EMBEDDING_SIZE, channels))
            self.add_module(f"fc_gamma{number}", nn.Linear(EMBEDDING_SIZE, channels))

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        change = maps
        for number in (1, 2):
            part = self._modules
            change = F.instance_norm(part[f"conv{number}"](F.pad(change, (1,) * 4, mode="reflect")))  # type: ignore[misc]
            change = part[f"fc_gamma{number}"](style)[..., None, None] * change  # type: ignore[misc]
            change = change + part[f"fc_beta{number}"](style)[..., None, None]  # type: ignore[misc]
            change = change.relu() if number == 1 else change
        return maps + change


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        down = [_Convolution(3, 32, 9), _Convolution(32, 64, 3, 2), _Convolution(64, 128, 3, 2)]
        up = [_Convolution(128, 64, 3, styled=True), _Convolution(64, 32, 3, styled=True)]
        self.layers = nn.ModuleList(
            [*down, *(_Residual(128) for _ in range(5)), *up, _Convolution(32, 3, 9, styled=True)]
        )

    def forward(self, images: Tensor, style: Tensor) -> Tensor:
        maps = images
        for number, layer in enumerate(self.layers):
            if number < 3:
                maps = layer(maps).relu()
            elif number < 8:
                maps = layer(maps, style)
            elif number < 10:
                maps = layer(F.interpolate(maps, scale_factor=2.0), style).relu()
            else:
                maps = layer(maps, style)
        return maps


class _Unit(nn.Module):
    def __init__(
        self, channels_in: int, channels_out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(channels_in, channels_out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, maps: Tensor) -> Tensor:
        normed: Tensor = self.bn(self.conv(maps))
        return normed.relu()


class _Branches(nn.ModuleDict):
    """Parallel chains over one input, joined by channels; `pool` is what the last chain begins with."""

    def __init__(self, chains: list[dict[str, nn.Module]], pool: nn.Module) -> None:
        super().__init__({name: unit for chain in chains for name, unit in chain.items()})
        self.chains = [list(chain) for chain in chains]
        self.pool = [pool]  # in a list: it has no weights, and the file does not name it

    def forward(self, maps: Tensor) -> Tensor:
        joined = []
        for number, chain in enumerate(self.chains):
            part = self.pool[0](maps) if number == len(self.chains) - 1 else maps
            for name in chain:
                part = self[name](part)
            joined.append(part)
        return torch.cat(joined, dim=1)


def _inception_a(channels: int, pooled: int) -> _Branches:
    return _Branches(
        [
            {"branch1x1": _Unit(channels, 64, 1)},
            {"branch5x5_1": _Unit(channels, 48, 1), "branch5x5_2": _Unit(48, 64, 5)},
            {
                "branch3x3dbl_1": _Unit(channels, 64, 1),
                "branch3x3dbl_2": _Unit(64, 96, 3),
                "branch3x3dbl_3": _Unit(96, 96, 3),
            },
            {"branch_pool": _Unit(channels, pooled, 1)},
        ],
        nn.AvgPool2d(3, 1, 1),
    )


def _inception_b(channels: int) -> _Branches:
    return _Branches(
        [
            {"branch3x3": _Unit(channels, 384, 3, 2, pad=False)},
            {
                "branch3x3dbl_1": _Unit(channels, 64, 1),
                "branch3x3dbl_2": _Unit(64, 96, 3),
                "branch3x3dbl_3": _Unit(96, 96, 3, 2, pad=False),
            },
            {},
        ],
        nn.MaxPool2d(3, 2),
    )


def _inception_c(channels: int, inner: int) -> _Branches:
    flat, tall = (1, 7), (7, 1)
    return _Branches(
        [
            {"branch1x1": _Unit(channels, 192, 1)},
            {
                "branch7x7_1": _Unit(channels, inner, 1),
                "branch7x7_2": _Unit(inner, inner, flat),
                "branch7x7_3": _Unit(inner, 192, tall),
            },
            {
                "branch7x7dbl_1": _Unit(channels, inner, 1),
                "branch7x7dbl_2": _Unit(inner, inner, tall),
                "branch7x7dbl_3": _Unit(inner, inner, flat),
                "branch7x7dbl_4": _Unit(inner, inner, tall),
                "branch7x7dbl_5": _Unit(inner, 192, flat),
            },
            {"branch_pool": _Unit(channels, 192, 1)},
        ],
        nn.AvgPool2d(3, 1, 1),
    )


class _StylePredictor(nn.Module):
    """Inception v3 up to Mixed_6e, averaged, and a linear layer: (B,3,H,W) in [0,1] -> (B,100). From 75 x 75."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c = _inception_a(192, 32), _inception_a(256, 64)
        self.Mixed_5d, self.Mixed_6a = _inception_a(288, 64), _inception_b(288)
        self.Mixed_6b, self.Mixed_6c = _inception_c(768, 128), _inception_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _inception_c(768, 160), _inception_c(768, 192)
        self.fc = nn.Linear(768, EMBEDDING_SIZE)

    def forward(self, images: Tensor) -> Tensor:
        # The published predictor divides blue by 0.255 and multiplies it by 0.225, and was used like this.
        shape = (1, 3, 1, 1)
        mean = torch.tensor([0.485, 0.456, 0.406], device=images.device).view(shape)
        first = torch.tensor([0.229, 0.224, 0.255], device=images.device).view(shape)
        second = torch.tensor([0.229, 0.224, 0.225], device=images.device).view(shape)
        maps = (images - mean) / first * (second / 0.5) + (mean - 0.5) / 0.5
        maps = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(maps)))
        maps = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(maps, 3, 2)))
        maps = F.max_pool2d(maps, 3, 2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a):
            maps = block(maps)
        for block in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e):
            maps = block(maps)
        embedding: Tensor = self.fc(maps.mean((2, 3)))
        return embedding

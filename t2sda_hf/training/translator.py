"""Training of a translator between the looks of two domains, for translate.engine trained (CycleGAN: Zhu et al. 2017).

Two generators and two patch discriminators learn from unpaired crops; no label is read, of either domain. Losses: a
least-squares adversary, and 10 x the L1 distance after there and back. No identity loss, which holds colours where they
are. Unlike the original there is no pool of old images, generators start at "no change", and the learning rate decays
linearly over the second half.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.domains import Domain
from ..data.transforms import pad_image, random_window
from ..errors import NotFinite
from ..storage import write_json
from ..translate.generator import TranslationGenerator, save_translator

CYCLE_WEIGHT = 10.0
LOGGED_EVERY = 50


@dataclass(frozen=True)
class TranslatorSettings:
    """How a translator is trained.

    Attributes:
        steps: updates.
        batch_size: crops of each domain, per process.
        crop_size: (height, width).
        lr: of both optimisers.
        width: channels of the generators at full resolution, and of the discriminators' first layer.
        num_blocks: residual blocks of a generator.
        seed: of the weights and crops.
        num_workers: processes that load ahead.
    """

    steps: int
    batch_size: int
    crop_size: tuple[int, int]
    lr: float
    width: int
    num_blocks: int
    seed: int
    num_workers: int = 0


class Crops(Dataset):
    """Crop number `position`, a function of (seed, position): (2,3,h,w) uint8, source and target."""

    def __init__(self, source: Domain, target: Domain, size: tuple[int, int], seed: int, length: int) -> None:
        self.domains, self.size, self.seed, self.length = (source, target), size, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Tensor:
        rng = np.random.default_rng([self.seed, position])
        crops = []
        for domain in self.domains:
            image = pad_image(domain.resized_image(int(rng.integers(len(domain)))), self.size)
            crop = random_window((image.shape[0], image.shape[1]), self.size, rng).of(image)
            crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        return torch.from_numpy(np.stack(crops).copy()).permute(0, 3, 1, 2)


class PatchDiscriminator(nn.Sequential):
    """Whether patches are of the domain: (B,3,H,W) in [0,1] -> (B,1,h,w), three steps down."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for channels in (width, 2 * width):
            layers += [nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False), nn.InstanceNorm2d(2 * channels)]
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, nn.Conv2d(4 * width, 1, 3, padding=1))


class Translators(nn.Module):
    """Both generators in one module, so that one optimiser and one wrapper serve them."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.forth, self.back = TranslationGenerator(width, num_blocks), TranslationGenerator(width, num_blocks)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        """All images that the losses compare."""
        to_target, to_source = self.forth(source), self.back(target)
        return {
            "to_target": to_target,
            "to_source": to_source,
            "source_again": self.back(to_target),
            "target_again": self.forth(to_source),
        }


class Discriminators(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_source, self.of_target = PatchDiscriminator(width), PatchDiscriminator(width)

    def forward(self, like_source: Tensor, like_target: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_source(like_source), self.of_target(like_target)


def generator_loss(made: dict[str, Tensor], source: Tensor, target: Tensor, judged: tuple[Tensor, Tensor]) -> Tensor:
    """What the generators minimise; `judged` are the discriminators on what was made."""
    adversary = sum(F.mse_loss(score, torch.ones_like(score)) for score in judged)
    cycle = F.l1_loss(made["source_again"], source) + F.l1_loss(made["target_again"], target)
    return adversary + CYCLE_WEIGHT * cycle


def discriminator_loss(real: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor]) -> Tensor:
    """1 for images of the domain, 0 for made ones."""
    parts = [F.mse_loss(score, torch.ones_like(score)) for score in real]
    parts += [F.mse_loss(score, torch.zeros_like(score)) for score in made]
    return torch.stack(parts).sum() / 2


def train_translator(
    settings: TranslatorSettings,
    source: Domain,
    target: Domain,
    folder: Path,
    accelerator: Accelerator,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Train, and write what `load_translator` and a reader need.

    folder/config.json, model.safetensors   source to target
    folder/backward/                        target to source
    folder/training.json                    domains, settings, losses, and what `about` says
    folder/preview.png                      source images over their translations, target images below

    Args:
        settings: see there.
        source, target: read without labels. Of the target, training images only.
        folder: written at the end, by the main process.
        accelerator: prepares the networks; every process calls this.
        about: what else training.json says.

    Raises:
        NotFinite: if the generators' loss is not finite.
    """
    torch.manual_seed(settings.seed)
    translators = Translators(settings.width, settings.num_blocks)
    discriminators = Discriminators(settings.width)
    optimizers = [
        torch.optim.Adam(module.parameters(), lr=settings.lr, betas=(0.5, 0.999))
        for module in (translators, discriminators)
    ]
    length = settings.steps * settings.batch_size * accelerator.num_processes
    crops_of_both = Crops(source, target, settings.crop_size, settings.seed, length)
    loader = DataLoader(crops_of_both, settings.batch_size, num_workers=settings.num_workers)
    translators, discriminators, *optimizers, loader = accelerator.prepare(
        translators, discriminators, *optimizers, loader
    )
    log: list[dict[str, float]] = []
    bar = tqdm(loader, disable=not accelerator.is_main_process, total=settings.steps)
    for step, crops in enumerate(bar):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * min(1.0, 2 * (1 - step / settings.steps))
        real_source, real_target = (crops.float() / 255).unbind(1)
        made = translators(real_source, real_target)

        discriminators.requires_grad_(False)
        judged = discriminators(made["to_source"], made["to_target"])
        loss = generator_loss(made, real_source, real_target, judged)
        accelerator.backward(loss)
        optimizers[0].step()
        optimizers[0].zero_grad()

        discriminators.requires_grad_(True)
        known = discriminators(real_source, real_target)
        found = discriminators(made["to_source"].detach(), made["to_target"].detach())
        doubt = discriminator_loss(known, found)
        accelerator.backward(doubt)
        optimizers[1].step()
        optimizers[1].zero_grad()
        if (step + 1) % LOGGED_EVERY == 0 or step + 1 == settings.steps:
            log.append({"step": step + 1, "generators": loss.item(), "discriminators": doubt.item()})
            bar.set_postfix({name: f"{value:.3g}" for name, value in log[-1].items() if name != "step"})
            if not np.isfinite(log[-1]["generators"]):
                raise NotFinite(f"the generators' loss is not finite at step {step + 1}; lower --lr.")
    if accelerator.is_main_process:
        plain = accelerator.unwrap_model(translators).eval()
        sizes = {"width": settings.width, "num_blocks": settings.num_blocks}
        save_translator(folder, plain.forth, sizes)
        save_translator(folder / "backward", plain.back, sizes)
        facts: dict[str, Any] = {"method": "CycleGAN", "source": source.name, "target": target.name}
        facts |= {"settings": asdict(settings), "num_processes": accelerator.num_processes, **(about or {}), "log": log}
        write_json(folder / "training.json", facts)
        preview(plain, source, target, accelerator.device).save(folder / "preview.png")
    accelerator.wait_for_everyone()


@torch.no_grad()
def preview(translators: Translators, source: Domain, target: Domain, device: torch.device) -> Image.Image:
    """Four source images over their translations, and a target image beside each pair, at the source's size."""
    columns = []
    for index in range(min(4, len(source))):
        image = torch.from_numpy(source.resized_image(index)).permute(2, 0, 1)[None].float().to(device) / 255
        style = (
            torch.from_numpy(target.resized_image(index % len(target))).permute(2, 0, 1)[None].float().to(device) / 255
        )
        style = F.interpolate(style, image.shape[-2:], mode="bilinear", antialias=True)
        columns.append(torch.cat([image, translators.forth(image).clamp(0, 1), style], dim=2))
    size = columns[0].shape[-2:]
    sheet = torch.cat([F.interpolate(column, size) for column in columns], dim=3)[0]
    return Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).cpu().numpy())

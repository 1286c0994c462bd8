"""Train a translator from one domain's look to another's, for translate.engine trained (CycleGAN: Zhu et al. 2017).

    accelerate launch scripts/train_translator.py --source streets-source --target streets-target \\
        --output_dir outputs/translators/streets --steps 2000 --crop 96 128

Two generators and two patch discriminators learn from unpaired crops; no label is read, of either domain. Losses: a
least-squares adversary, and 10 x the L1 distance after there and back. No identity loss, which holds colours where they
are. Unlike the original there is no pool of old images, generators start at "no change", and the learning rate decays
linearly over the second half.

Writes into output_dir: config.json and model.safetensors (source to target; what translate.trained.model reads),
backward/ (target to source), training.json (domains, settings, losses), preview.png. Domains are names, parquet files
or folders, as in a run's config. On the target, use training images only.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from t2sda_hf.config import DomainConfig
from t2sda_hf.data.domains import Domain, load_domain
from t2sda_hf.data.transforms import pad_image, random_window
from t2sda_hf.masking import run_masked
from t2sda_hf.translate.generator import TranslationGenerator, save_translator

CYCLE_WEIGHT = 10.0
LOGGED_EVERY = 50


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


def train(args: argparse.Namespace, accelerator: Accelerator, source: Domain, target: Domain) -> dict[str, Any]:
    """Train and write the folder; the facts of training.json."""
    torch.manual_seed(args.seed)
    translators, discriminators = Translators(args.width, args.blocks), Discriminators(args.width)
    optimizers = [
        torch.optim.Adam(module.parameters(), lr=args.lr, betas=(0.5, 0.999))
        for module in (translators, discriminators)
    ]
    length = args.steps * args.batch_size * accelerator.num_processes
    loader = DataLoader(
        Crops(source, target, tuple(args.crop), args.seed, length), args.batch_size, num_workers=args.num_workers
    )
    translators, discriminators, *optimizers, loader = accelerator.prepare(
        translators, discriminators, *optimizers, loader
    )
    log: list[dict[str, float]] = []
    bar = tqdm(loader, disable=not accelerator.is_main_process, total=args.steps)
    for step, crops in enumerate(bar):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, 2 * (1 - step / args.steps))
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
        if (step + 1) % LOGGED_EVERY == 0 or step + 1 == args.steps:
            log.append({"step": step + 1, "generators": loss.item(), "discriminators": doubt.item()})
            bar.set_postfix({name: f"{value:.3g}" for name, value in log[-1].items() if name != "step"})
            if not np.isfinite(log[-1]["generators"]):
                raise FloatingPointError(f"the generators' loss is not finite at step {step + 1}; lower --lr.")
    facts = {"method": "CycleGAN", "source": source.name, "target": target.name, "log": log}
    facts |= {"settings": {name: value for name, value in vars(args).items() if name != "output_dir"}}
    if accelerator.is_main_process:
        plain = accelerator.unwrap_model(translators).eval()
        sizes = {"width": args.width, "num_blocks": args.blocks}
        save_translator(args.output_dir, plain.forth, sizes)
        save_translator(args.output_dir / "backward", plain.back, sizes)
        (args.output_dir / "training.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        preview(plain, source, target, accelerator.device).save(args.output_dir / "preview.png")
    accelerator.wait_for_everyone()
    return facts


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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="name, parquet file or folder; its training split is read")
    parser.add_argument("--target", required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="must be empty or not exist")
    parser.add_argument("--source_resize", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="ratio is kept")
    parser.add_argument("--target_resize", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop", type=int, nargs=2, default=[256, 256], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--batch_size", type=int, default=1, help="per process")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--width", type=int, default=32, help="channels of the generators at full resolution")
    parser.add_argument("--blocks", type=int, default=6, help="residual blocks of a generator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_workers", type=int, default=0)
    args = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "width", "blocks"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if min(args.crop) < 32:
        raise ValueError(f"--crop must be at least 32 32, got {args.crop}.")
    if args.lr <= 0:
        raise ValueError(f"--lr must be positive, got {args.lr}.")
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise ValueError(f"--output_dir {str(args.output_dir)!r} is not empty. Nothing is overwritten: give another.")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line when the input is at fault."""
    try:
        args = parse_arguments(arguments)
        sizes = [tuple(size) if size else None for size in (args.source_resize, args.target_resize)]
        configs = [
            DomainConfig(path=path, resize=size) for path, size in zip((args.source, args.target), sizes, strict=True)
        ]
        source, target = (load_domain(config, labelled=False) for config in configs)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    train(args, accelerator, source, target)
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))

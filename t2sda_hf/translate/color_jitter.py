"""SimCLR's colour distortion as a translation (paper Table 11; method 5.2)."""

import torch
from torch import Generator, Tensor

from ..augment.color import ColorSteps, change_colors, color_step
from ..device import per_channel

GREY = (0.2989, 0.587, 0.114)  # luma of red, green and blue


@torch.no_grad()
def simclr_color_jitter(images: Tensor, probability: float, strength: float, generator: Generator) -> Tensor:
    """Brightness, contrast, saturation ×U(max(0, 1-0.8s), 1+0.8s) and a hue turned by U(-0.2s, 0.2s) of a full turn.

    The semantics are those of torchvision's ColorJitter: brightness multiplies, contrast mixes with the image's mean
    grey, saturation with every pixel's own; values are clamped after each. Whether, how much and in which order is
    drawn per image. SimCLR's random greyscale is left out, because the paper names the jitter alone.

    Args:
        images: (B,3,H,W) RGB in [0,1].
        probability: of an image to be changed; 0.8 in SimCLR.
        strength: s in [0,1]; 1 in SimCLR.
        generator: of the CPU.

    Returns:
        (B,3,H,W) in [0,1]. An image that is not changed is returned as it is.
    """
    return torch.cat([_jitter_one(image[None], probability, strength, generator) for image in images])


def _jitter_one(image: Tensor, probability: float, strength: float, generator: Generator) -> Tensor:
    changes = float(torch.rand(1, generator=generator)) < probability
    draws = 2 * torch.rand(4, generator=generator) - 1
    order = torch.randperm(4, generator=generator).tolist()  # always drawn: the next image's draws do not move
    if not changes:
        return image
    brightness, contrast, saturation = (1 + 0.8 * strength * draws[:3]).clamp(min=0).tolist()
    luma = per_channel(GREY, image)
    for operation in order:
        if operation == 0:
            image = brightness * image
        elif operation == 1:
            image = contrast * image + (1 - contrast) * (image * luma).sum(1, keepdim=True).mean()
        elif operation == 2:
            image = saturation * image + (1 - saturation) * (image * luma).sum(1, keepdim=True)
        else:
            turn = color_step(0.2 * strength * draws[3:], torch.ones(1))
            image = change_colors(image, ColorSteps(None, (turn,)))
        image = image.clamp(0, 1)
    return image

"""SimCLR's Gaussian blur as a translation (paper Table 11; method 5.2)."""

import torch
from torch import Generator, Tensor

from ..augment.color import blur_kernel_size, gaussian_blur
from ..device import sent


@torch.no_grad()
def simclr_blur(images: Tensor, probability: float, sigma: tuple[float, float], generator: Generator) -> Tensor:
    """Blur with σ ~ U(sigma) and a kernel of a tenth of the height, drawn per image; borders are reflected.

    Args:
        images: (B,3,H,W).
        probability: of an image to be blurred; 0.5 in SimCLR.
        sigma: lower and upper end in pixels; 0.1 and 2 in SimCLR.
        generator: of the CPU.

    Returns:
        (B,3,H,W). An image that is not blurred is returned as it is.
    """
    blurs, shares = torch.rand(len(images), 2, generator=generator).unbind(1)
    side = min(blur_kernel_size(images.shape[-2]), 2 * images.shape[-1] - 1)  # as far as a border can be reflected
    blurred = gaussian_blur(images, sigma[0] + (sigma[1] - sigma[0]) * shares, (side, side))
    return torch.where(sent(blurs < probability, images.device).view(-1, 1, 1, 1), blurred, images)

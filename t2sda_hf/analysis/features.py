"""Features of labelled pixels, image by image, so that memory does not grow with the number of images."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ..data.transforms import InputSize
from ..errors import NotFinite
from ..evaluation.evaluator import LabelledDomain, where
from ..evaluation.inference import to_pixel_values
from ..labels import IGNORE_INDEX
from ..models import T2SDAForSemanticSegmentation
from ..models.backbone import STRIDES
from ..models.heads import upsample
from ..models.image_processing_t2sda import sample_nearest

Kind = Literal["head", "encoder_concat", "proj"]
KINDS: tuple[Kind, ...] = ("head", "encoder_concat", "proj")


@torch.no_grad()
def feature_map(model: T2SDAForSemanticSegmentation, pixel_values: Tensor, kind: Kind = "head") -> Tensor:
    """Features of every cell of one of the model's maps (method 6.3).

    Args:
        model: in eval mode. With two resolutions (HRDA) it is the context that is looked at.
        pixel_values: (B,3,H,W) normalised.
        kind: "head": what the classifier reads, which every model has, and is >= 0. "encoder_concat": the encoder's
            maps, resized to the finest. "proj": the projector's embeddings, which only a model trained with the pull
            loss has learned.

    Returns:
        (B,D,h,w) float32.
    """
    output = model(pixel_values, project=kind == "proj", segment=False, output_hidden_states=True)
    maps = output.hidden_states
    if kind == "proj":
        features = output.embeddings
    elif kind == "head":
        features = model.decode_head.penultimate(maps)
    else:
        features = torch.cat([upsample(level, maps[0].shape[-2:]) for level in maps], dim=1)
    # Without the cells that see only padding, to multiples of 32 or of HRDA's grid: labels are of the image alone.
    pixels = STRIDES[0] * (2 if model.config.multi_resolution else 1)
    height, width = (-(-side // pixels) for side in pixel_values.shape[-2:])
    return features[..., :height, :width].float()


def labelled_features(
    model: T2SDAForSemanticSegmentation,
    domain: LabelledDomain,
    image_size: InputSize,
    kind: Kind = "head",
    limit: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of the labelled cells, one image at a time.

    Args:
        model, kind: see `feature_map`.
        domain: labels are sampled at the cells (nearest).
        image_size: of the network's input.
        limit: only the first so many images.

    Yields:
        (N,D) float32 and (N,) int64 on the CPU; N differs, and may be 0.

    Raises:
        NotFinite: naming an image whose features are not.
    """
    device = next(model.parameters()).device
    for index in range(len(domain) if limit is None else min(limit, len(domain))):
        features = feature_map(model, to_pixel_values(domain.image(index), image_size, device), kind)[0]
        if not torch.isfinite(features).all():
            raise NotFinite(f"{where(domain, index)}: the features that the network makes of it are NaN or infinite.")
        labels = torch.from_numpy(domain.labels(index)).long()
        sampled = sample_nearest(labels, (features.shape[1], features.shape[2])).flatten()
        known = sampled != IGNORE_INDEX
        yield features.flatten(1).T.cpu()[known], sampled[known]

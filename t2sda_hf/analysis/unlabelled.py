"""What can be said of models on images without labels: the proxies of training, measured on a fixed set."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from ..data.transforms import InputSize
from ..evaluation.inference import naming, predict_logits, to_pixel_values
from ..evaluation.watch import Watch
from ..models import T2SDAForSemanticSegmentation


class Images(Protocol):
    """Images (H,W,3) uint8 RGB by index."""

    def __len__(self) -> int: ...

    def image(self, index: int, /) -> np.ndarray: ...


def measure(
    models: Mapping[str, tuple[T2SDAForSemanticSegmentation, InputSize]],
    images: Images,
    num_classes: int,
    threshold: float,
    limit: int | None = None,
    **windows: Any,
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray], list[str]]:
    """Predict all images with every model, without labels.

    Args:
        models: title -> model in eval mode, and its input size.
        images: a domain.
        num_classes: K, of every model.
        threshold: confidence from which a pixel counts as covered.
        limit: only the first so many images.
        windows: mode, window and stride of `predict_logits`; the whole image without them.

    Returns:
        title -> confidence and coverage (see `evaluation.watch`), and "agreement with <other>": share of pixels with
        the same class; title -> (K,) shares of the predicted classes; and what could not be read, in words.
    """
    watches = {title: Watch([1] * num_classes, threshold) for title in models}
    agreeing = dict.fromkeys(combinations(models, 2), 0)
    pixels = 0
    unreadable = []
    for index in tqdm(range(len(images) if limit is None else min(limit, len(images))), desc="images"):
        try:
            image = images.image(index)
        except (ValueError, OSError) as error:
            unreadable.append(str(error))
            continue
        said = {}
        for title, (model, size) in models.items():
            with naming(f"{title}, image {index}"):
                pixel_values = to_pixel_values(image, size, next(model.parameters()).device)
                logits = predict_logits(model, pixel_values, **windows)
            watches[title].look({"teacher_logits": logits.cpu()})
            said[title] = torch.nn.functional.interpolate(logits, image.shape[:2], mode="bilinear").argmax(1).cpu()
        pixels += image.shape[0] * image.shape[1]
        for one, other in agreeing:
            agreeing[one, other] += int((said[one] == said[other]).sum())
    if not pixels:
        raise ValueError(f"none of {len(unreadable)} images can be read. The first: {unreadable[0]}")
    found, shares = {}, {}
    for title, watch in watches.items():
        shares[title] = (watch.shares / watch.shares.sum()).numpy()
        proxies = watch.read(lambda sums: sums)
        found[title] = {name: proxies[name] for name in ("confidence", "coverage")}
        for (one, other), count in agreeing.items():
            if title in (one, other):
                found[title][f"agreement with {other if title == one else one}"] = count / pixels
    return found, shares, unreadable

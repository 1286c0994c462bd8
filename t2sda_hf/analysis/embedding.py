"""t-SNE of pixel features of both domains (Fig. 8; method 6.5)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Sample:
    """Some pixels of every class.

    Attributes:
        features: (N,D) float32.
        labels: (N,) int64.
    """

    features: Tensor
    labels: Tensor


def sample_pixels(
    stream: Iterable[tuple[Tensor, Tensor]], num_classes: int, per_class: int = 256, seed: int = 0
) -> Sample:
    """Draw pixels of every class evenly and without repetition from a stream, all there are if there are fewer.

    Every pixel gets a random number, and those with the smallest numbers of their class are kept: no second pass, and
    memory for `per_class` pixels of each class only.
    """
    generator = Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0, 0))] * num_classes
    for features, labels in stream:
        lots = torch.rand(len(labels), generator=generator)
        for class_id in labels.unique().tolist():
            mine = labels == class_id
            old_lots, old_features = kept[class_id]
            all_lots = torch.cat([old_lots, lots[mine]])
            rows = features[mine]
            all_features = rows if not len(old_lots) else torch.cat([old_features, rows])
            best = all_lots.argsort()[:per_class]
            kept[class_id] = all_lots[best], all_features[best]
    found = [(class_id, features) for class_id, (lots, features) in enumerate(kept) if len(lots)]
    if not found:
        raise ValueError("no pixel is labelled with a class of the model: there is nothing to draw.")
    return Sample(
        torch.cat([features for _, features in found]),
        torch.cat([torch.full((len(features),), class_id) for class_id, features in found]),
    )


def embed(samples: Sequence[Sample], perplexity: float = 30, seed: int = 0) -> list[np.ndarray]:
    """Put several samples into one plane: unit length, PCA to 50 dimensions, t-SNE.

    Returns:
        (N,2) float32 for each sample, in its order.

    Raises:
        ValueError: for too few pixels for the perplexity, or without scikit-learn.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError(
            "t-SNE needs scikit-learn: pip install 't2sda_hf[analysis]', or leave out --parts tsne."
        ) from error
    features = torch.nn.functional.normalize(torch.cat([sample.features for sample in samples]), dim=1).numpy()
    if len(features) <= 3 * perplexity:
        raise ValueError(
            f"t-SNE with perplexity {perplexity} needs more than {3 * perplexity:.0f} pixels, got {len(features)}."
        )
    dimensions = min(50, *features.shape)
    reduced = PCA(dimensions, random_state=seed).fit_transform(features)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return np.split(plane, np.cumsum([len(sample.labels) for sample in samples])[:-1])

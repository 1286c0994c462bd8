import math

import numpy as np
import pytest
import torch
from reference.distances import slow_ccd, slow_pdd

from t2sda_hf.analysis.distances import (
    centres,
    class_center_distance,
    cross_domain_similarity,
    pixel_discrimination_distance,
)


@pytest.fixture
def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """200 features >= 0 of four of five classes, around different centres."""
    random = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 3, 4])[torch.randint(0, 4, (200,), generator=random)]
    means = 3 * torch.rand(5, 6, generator=random)
    return (means[labels] + torch.randn(200, 6, generator=random)).clamp(min=0), labels


def stream(pixels: tuple, parts: int = 3):
    return zip(pixels[0].chunk(parts), pixels[1].chunk(parts), strict=True)


def test_both_distances_equal_their_slow_twins(pixels: tuple) -> None:
    features, labels = pixels[0].double().numpy(), pixels[1].numpy()
    found = centres(stream(pixels), 5)
    ccd, pdd = class_center_distance(found), pixel_discrimination_distance(stream(pixels), found)
    for i in (0, 1, 3, 4):
        assert ccd[i] == pytest.approx(slow_ccd(features, labels, i), rel=1e-10)
        assert pdd[i] == pytest.approx(slow_pdd(features, labels, i), rel=1e-10)
    assert math.isnan(ccd[2])
    assert math.isnan(pdd[2])


def test_two_classes_by_hand() -> None:
    """Class 0 at (2,0) and (4,0), class 1 at (0,5): centres (3,0), (0,5), 34 apart squared; scatter 1 and 0."""
    pixels = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 1])
    found = centres([pixels], 2)
    assert found.counts.tolist() == [2, 1]
    assert found.means.tolist() == [[3, 0], [0, 5]]
    assert found.scatter.tolist() == [1, 0]
    assert class_center_distance(found).tolist() == pytest.approx([1 / 34, 0])
    # cos to the own centre is 1, to the other 0, which counts as 1e-6
    assert pixel_discrimination_distance([pixels], found).tolist() == pytest.approx([1 - 1e6, 1 - 1e6])


def test_neither_the_order_nor_the_cut_of_the_stream_matters(pixels: tuple) -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    mixed = pixels[0][order], pixels[1][order]
    one, other = centres([pixels], 5), centres(stream(mixed, 17), 5)
    np.testing.assert_allclose(class_center_distance(one), class_center_distance(other), rtol=1e-10)
    np.testing.assert_allclose(
        pixel_discrimination_distance([pixels], one),
        pixel_discrimination_distance(stream(mixed, 17), other),
        rtol=1e-10,
    )


def test_shift_and_scale(pixels: tuple) -> None:
    """CCD compares distances: moving everything far away or making it larger changes nothing. PDD allows scale."""
    ccd = class_center_distance(centres([pixels], 5))
    moved = (pixels[0].double() + 1000).float(), pixels[1]
    np.testing.assert_allclose(class_center_distance(centres([moved], 5)), ccd, rtol=1e-3)  # float32 near 1000
    large = 8 * pixels[0], pixels[1]
    np.testing.assert_allclose(class_center_distance(centres([large], 5)), ccd, rtol=1e-6)
    pdd = pixel_discrimination_distance([pixels], centres([pixels], 5))
    np.testing.assert_allclose(pixel_discrimination_distance([large], centres([large], 5)), pdd, rtol=1e-6)


def test_better_separated_classes_score_lower(pixels: tuple) -> None:
    features, labels = pixels
    means = centres([pixels], 5).means.float()
    tight = means[labels] + 0.3 * (features - means[labels]), labels
    one, other = centres([pixels], 5), centres([tight], 5)
    seen = [0, 1, 3, 4]
    assert (class_center_distance(other)[seen] < class_center_distance(one)[seen]).all()


def test_one_class_alone_and_no_pixels() -> None:
    pixels = torch.rand(4, 3), torch.ones(4, dtype=torch.long)
    found = centres([pixels], 2)
    assert np.isnan(class_center_distance(found)).all()
    assert np.isnan(pixel_discrimination_distance([pixels], found)).all()
    with pytest.raises(ValueError, match="no pixel is labelled"):
        centres([(torch.empty(0, 3), torch.empty(0, dtype=torch.long))], 2)


def test_similarity_across_domains_by_hand() -> None:
    source = centres([(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]))], 3)
    target = centres([(torch.tensor([[1.0, 1.0], [5.0, 1.0]]), torch.tensor([0, 2]))], 3)
    similarity = cross_domain_similarity(source, target)
    assert similarity[0] == pytest.approx(1 / math.sqrt(2))
    assert np.isnan(similarity[1:]).all()  # each domain lacks one of them
    assert cross_domain_similarity(source, source)[:2].tolist() == pytest.approx([1, 1])

"""The distance to the ImageNet features, and the labels at their size."""

import pytest
import reference.segmentation as slow
import torch
from torch import Tensor

from t2sda_hf.losses.feature_distance import downscale_labels_by_share, feature_distance

K = 4


def cell(share: float, winner: int = 2, other: int = 0, side: int = 32) -> Tensor:
    """A block of labels with `share` of one class, the rest of another."""
    labels = torch.full((side * side,), other)
    labels[: round(share * side * side)] = winner
    return labels[torch.randperm(side * side, generator=torch.Generator().manual_seed(0))].view(1, side, side)


@pytest.mark.parametrize(("share", "expected"), [(0.74, 255), (0.75, 2), (0.76, 2), (1.0, 2), (0.24, 0), (0.5, 255)])
def test_a_class_must_cover_three_quarters_of_a_cell(share, expected):
    assert downscale_labels_by_share(cell(share), (1, 1), K, 0.75).tolist() == [[[expected]]]


def test_a_mostly_ignored_cell_is_ignored():
    assert downscale_labels_by_share(cell(0.9, winner=255), (1, 1), K, 0.75).tolist() == [[[255]]]


def test_a_cell_is_not_won_over_the_labelled_pixels_alone():
    assert downscale_labels_by_share(cell(0.3, winner=255, other=1), (1, 1), K, 0.75).tolist() == [[[255]]]


def test_downscaling_equals_the_loop_over_cells():
    random = torch.Generator().manual_seed(0)
    cells = torch.randint(0, K, (2, 3, 5), generator=random).repeat_interleave(3, 1).repeat_interleave(3, 2)
    noise = torch.randint(0, K, cells.shape, generator=random)
    labels = torch.where(torch.rand(cells.shape, generator=random) < 0.5, cells, noise)
    labels[0, :4, :7] = 255
    small = downscale_labels_by_share(labels, (3, 5), K, 0.6)  # 9 pixels a cell: no two classes can have 60 %
    assert set(small.unique().tolist()) == {0, 1, 2, 3, 255}
    for b, i, j in ((b, i, j) for b in range(2) for i in range(3) for j in range(5)):
        assert small[b, i, j] == slow.cell_class(labels[b, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3], 0.6)


@pytest.mark.parametrize("size", [(3, 4), (4, 5)])
def test_cells_must_divide_the_labels(size):
    with pytest.raises(ValueError, match=r"8x12 do not divide into .* multiples of 32"):
        downscale_labels_by_share(torch.zeros(1, 8, 12, dtype=torch.int64), size, K, 0.75)


def scene() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    cells = torch.randint(0, K, (2, 3, 4), generator=random)
    cells[0, 0, 0] = 255
    labels = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.randn(2, 5, 3, 4, generator=random), torch.randn(2, 5, 3, 4, generator=random), labels


@pytest.mark.parametrize("classes", [(1,), (1, 3), (0, 1, 2, 3)])
def test_equals_the_loop_over_cells(classes):
    features, frozen, labels = scene()
    loss = feature_distance(features, frozen, labels, K, classes, 0.75)
    assert loss.item() == pytest.approx(slow.feature_distance(features, frozen, labels, classes, 0.75), rel=1e-5)


def test_it_is_a_distance_not_a_square_and_a_mean_over_cells_of_the_batch():
    features = torch.zeros(2, 2, 1, 2)
    features[0, :, 0, 0] = torch.tensor([3.0, 4.0])  # distance 5
    features[1, :, 0, 1] = torch.tensor([0.0, 2.0])  # distance 2
    features[0, :, 0, 1] = 100.0  # another class
    labels = torch.tensor([[[1, 0]], [[1, 1]]]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    loss = feature_distance(features, torch.zeros_like(features), labels, K, (1,), 0.75)
    assert loss.item() == pytest.approx((5 + 0 + 2) / 3)


def test_without_classes_every_cell_counts():
    features, frozen, labels = scene()
    loss = feature_distance(features, frozen, labels, K, None, 0.75)
    assert loss.item() == pytest.approx((features - frozen).norm(dim=1).mean().item(), rel=1e-6)


@pytest.mark.parametrize("classes", [(2,), ()])
def test_no_cell_is_zero_with_zero_gradients(classes):
    features, frozen, labels = scene()
    labels[labels == 2] = 255
    features.requires_grad_()
    loss = feature_distance(features, frozen, labels, K, classes, 0.75)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_equal_features_have_a_finite_gradient():
    """The student starts as a copy of the frozen encoder, where the norm has no derivative."""
    features, _, labels = scene()
    features.requires_grad_()
    loss = feature_distance(features, features.detach().clone(), labels, K, (1,), 0.75)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_only_cells_that_count_have_a_gradient():
    features, frozen, labels = scene()
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(feature_distance(features, frozen, labels, K, (1,), 0.75), features)
    assert torch.equal(gradient.abs().sum(dim=1) > 0, labels[:, ::8, ::8] == 1)

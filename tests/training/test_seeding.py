"""Randomness is a function of (seed, step, slot): equal where they are equal, different where one differs."""

import itertools

import numpy as np
import pytest
import torch

from t2sda_hf.training.seeding import seed_initial_weights, seed_step

CPU = torch.device("cpu")


def draws(seed: int, step: int, slot: int) -> tuple[float, ...]:
    """One number of each returned generator, one of torch's global one."""
    generators = (*seed_step(seed, step, slot, CPU), None)
    return tuple(torch.rand((), generator=generator, dtype=torch.float64).item() for generator in generators)


def test_equal_places_draw_equal_numbers_whatever_happened_before():
    first = draws(1, 2, 3)
    torch.manual_seed(99)
    torch.rand(7)
    np.random.SeedSequence(5).generate_state(3)
    draws(1, 3, 3)
    assert draws(1, 2, 3) == first


def test_all_places_draw_different_numbers():
    """Neighbours in seed, step and slot, swapped ones too, of both generators."""
    places = [*itertools.product(range(5), range(12), range(4)), (0, 40_000, 0), (40_000, 0, 0), (2**40, 0, 0)]
    numbers = [number for place in places for number in draws(*place)]
    assert len(set(numbers)) == 3 * len(places)


def test_numbers_are_spread_evenly():
    """Seeds of neighbours must not give neighbouring numbers."""
    numbers = np.array([draws(0, step, 0) for step in range(1000)])
    for column in numbers.T:
        assert np.histogram(column, bins=10, range=(0, 1))[0] == pytest.approx([100] * 10, abs=40)
    assert abs(np.corrcoef(numbers.T)[0, 1]) < 0.1
    assert abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 0.1


def test_dropout_is_seeded_by_the_step():
    dropped = []
    for place in ((0, 5, 0), (0, 5, 0), (0, 6, 0), (0, 5, 1)):
        seed_step(*place, CPU)
        dropped.append(torch.nn.functional.dropout(torch.ones(64)))
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])
    assert not torch.equal(dropped[0], dropped[3])


def test_the_generator_of_the_objective_does_not_move_with_dropout():
    first, second = seed_step(0, 0, 0, CPU)[0], seed_step(0, 0, 0, CPU)[0]
    torch.rand(100)  # the networks
    assert torch.equal(torch.rand(5, generator=first), torch.rand(5, generator=second))


def test_initial_weights_are_a_function_of_the_seed():
    weights = []
    for seed in (0, 0, 1):
        torch.rand(3)
        seed_initial_weights(seed)
        weights.append(torch.nn.Linear(4, 4).weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_initial_weights_and_the_first_step_do_not_share_numbers():
    seed_initial_weights(0)
    initial = torch.rand((), dtype=torch.float64).item()
    assert initial not in draws(0, 0, 0)

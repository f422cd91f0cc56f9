"""The order of rows in batches of similar length."""

import datasets
import numpy as np
import pytest
import torch

from orchestrator.training.engines.sampler import LengthGroupedSampler, row_lengths

LENGTHS = np.random.default_rng(0).integers(5, 200, size=203).tolist()
STEP_ROWS = 8


def order(seed: int, epoch: int) -> list[int]:
    sampler = LengthGroupedSampler(LENGTHS, STEP_ROWS, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = order(3, 2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert order(3, 2) == first
    assert torch.equal(torch.get_rng_state(), state), "the process's random state is left alone"


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (2, 0)])
def test_another_seed_or_epoch_gives_another_order(other: tuple[int, int]) -> None:
    assert order(*other) != order(0, 0)


def test_seed_and_epoch_are_not_added() -> None:
    assert order(0, 1) != order(1, 0)


def test_every_row_comes_once_an_epoch_among_rows_of_similar_length() -> None:
    rows = order(0, 0)
    assert sorted(rows) == list(range(len(LENGTHS)))
    steps = [[LENGTHS[row] for row in rows[at : at + STEP_ROWS]] for at in range(0, len(rows), STEP_ROWS)]
    spread = np.mean([max(step) - min(step) for step in steps])
    assert spread < 0.3 * (max(LENGTHS) - min(LENGTHS)), "random batches would spread over most of the range"


def test_row_lengths_follow_the_order_of_the_rows() -> None:
    rows = datasets.Dataset.from_list([{"input_ids": [1] * length, "labels": [1] * length} for length in (4, 2, 3)])
    assert row_lengths(rows) == [4, 2, 3]
    assert row_lengths(rows.select([2, 0])) == [3, 4]

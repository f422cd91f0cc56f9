"""An adapter at another rank: a higher one keeps the update, a lower one its best approximation."""

import pytest
import torch

from orchestrator.training.model.rank_change import change_rank


def matrices(rank: int, width: int = 24, height: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rank, width, generator=generator), torch.randn(height, rank, generator=generator)


def changed(
    a: torch.Tensor, b: torch.Tensor, rank: int, scale: float = 2.0, new_scale: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    return change_rank(a, b, rank, scale, new_scale, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("new_scale", [2.0, 1.0, 0.5])
@pytest.mark.parametrize("rank", [4, 8, 13])
def test_a_higher_rank_keeps_the_update_and_every_new_direction_can_learn(rank: int, new_scale: float) -> None:
    a, b = matrices(4)
    new_a, new_b = changed(a, b, rank, 2.0, new_scale)
    assert (new_a.shape, new_b.shape) == ((rank, 24), (16, rank))
    torch.testing.assert_close(new_scale * new_b @ new_a, 2.0 * b @ a, atol=1e-6, rtol=1e-6)
    assert bool((new_a.abs().sum(1) > 0).all()), "with zeros in A and in B a direction would never get a gradient"


@pytest.mark.parametrize("new_scale", [2.0, 4.0])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_lower_rank_is_the_best_approximation(rank: int, new_scale: float) -> None:
    a, b = matrices(8)
    new_a, new_b = changed(a, b, rank, 2.0, new_scale)
    assert (new_a.shape, new_b.shape) == ((rank, 24), (16, rank))
    update = (2.0 * b @ a).double()
    singular = torch.linalg.svdvals(update)
    error = torch.linalg.norm(update - new_scale * (new_b @ new_a).double())
    assert float(error) == pytest.approx(float(singular[rank:].norm()), rel=1e-4)


def test_a_rank_that_the_update_has_not_reached_loses_nothing() -> None:
    a, b = matrices(8)
    b[:, 3:] = 0
    new_a, new_b = changed(a, b, 3)
    torch.testing.assert_close(new_b @ new_a, b @ a, atol=1e-5, rtol=1e-5)


def test_a_layer_may_be_narrower_than_both_ranks() -> None:
    a, b = matrices(12, width=4, height=5)
    new_a, new_b = changed(a, b, 6)
    assert (new_a.shape, new_b.shape) == ((6, 4), (5, 6))
    torch.testing.assert_close(new_b @ new_a, b @ a, atol=1e-5, rtol=1e-5)

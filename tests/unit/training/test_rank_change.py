"""An adapter at another rank: a higher one keeps the update, a lower one its best approximation."""

import pytest
import torch

from orchestrator.training.model.rank_change import change_moments, change_rank


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


def gradients(a: torch.Tensor, b: torch.Tensor, scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of A and B of a random linear function of `scale B A`."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    of_update = torch.randn(len(b), a.shape[1], generator=torch.Generator().manual_seed(seed))
    (of_update * (scale * b @ a)).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    return a.grad, b.grad


@pytest.mark.parametrize(("rank", "new_scale"), [(12, 2.0), (8, 0.5), (3, 2.0), (5, 4.0)])
def test_the_first_moment_is_that_of_the_gradients_of_the_new_matrices(rank: int, new_scale: float) -> None:
    """The mean of gradients at the old matrices, transformed, is the mean of the gradients at the new ones."""
    a, b = matrices(8)
    new = changed(a, b, rank, 2.0, new_scale)
    old_grads = [gradients(a, b, 2.0, seed) for seed in range(5)]
    new_grads = [gradients(*new, new_scale, seed) for seed in range(5)]
    first = sum(each[0] for each in old_grads) / 5, sum(each[1] for each in old_grads) / 5
    second = tuple(sum(each[i].square() for each in old_grads) / 5 for i in (0, 1))
    (m_a, m_b), (v_a, v_b) = change_moments((a, b), new, new_scale / 2.0, first, second)
    known = min(rank, 8)
    torch.testing.assert_close(m_a[:known], sum(each[0] for each in new_grads)[:known] / 5, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(m_b[:, :known], sum(each[1] for each in new_grads)[:, :known] / 5, atol=1e-4, rtol=1e-3)
    assert not m_a[known:].any()
    assert not m_b[:, known:].any()
    assert (v_a.shape, v_b.shape) == (m_a.shape, m_b.shape)
    assert bool((v_a > 0).all())
    assert bool((v_b > 0).all()), "a second moment of zero would make the first step of a new rank too large"


@pytest.mark.parametrize("rank", [8, 12])
def test_second_moments_of_ranks_that_stay_follow_the_scale(rank: int) -> None:
    a, b = matrices(8)
    new = changed(a, b, rank, 2.0, 1.0)
    v_a, v_b = torch.rand_like(a), torch.rand_like(b)
    _, (new_a, new_b) = change_moments((a, b), new, 0.5, (a, b), (v_a, v_b))
    torch.testing.assert_close(new_a[:8], v_a)
    torch.testing.assert_close(new_b[:, :8], v_b / 4, msg="B is twice as large, and its gradients half as large")

"""Draws of requests with a seed, beside others without one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.deploy.serving.seeded import SeededDraw, token_seed


def request(position: int, **arguments: int) -> Any:
    state = SimpleNamespace(logit_processor_kwargs=arguments, generated_tokens=[0] * position)
    return SimpleNamespace(state=state)


def test_a_request_with_a_seed_has_one_token_left_and_others_keep_their_scores() -> None:
    draw, scores = SeededDraw(), torch.randn(3, 50)
    before = scores.clone()
    arguments = draw.prepare_tensor_args([request(0), request(4, seed=7), request(0)])
    after = draw(scores, torch.cat([arguments, torch.full((5,), -1, dtype=torch.int32)]))
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] > float("-inf")).sum() == 1


def test_the_draw_depends_on_seed_and_position_and_not_on_the_other_requests() -> None:
    draw, row = SeededDraw(), torch.zeros(1, 1000)

    def token(others: int, position: int, seed: int) -> int:
        asked = [request(1, seed=5)] * others + [request(position, seed=seed)]
        return int(draw(row.repeat(len(asked), 1), draw.prepare_tensor_args(asked))[-1].argmax())

    assert token(0, 3, 1) == token(6, 3, 1)
    assert len({token(0, position, 1) for position in range(20)}) > 15
    assert len({token(0, 3, seed) for seed in range(20)}) > 15


def test_draws_follow_the_softmax() -> None:
    draw, probabilities = SeededDraw(), torch.tensor([0.5, 0.3, 0.2, 0.0])
    asked = [request(0, seed=seed) for seed in range(4000)]
    tokens = draw(probabilities.log().repeat(4000, 1), draw.prepare_tensor_args(asked)).argmax(-1)
    shares = torch.bincount(tokens, minlength=4) / 4000
    assert shares.tolist() == pytest.approx(probabilities.tolist(), abs=0.03)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_seed_gives_a_number_that_fits(seed: int) -> None:
    assert 0 <= token_seed(seed, 100_000) < 2**31

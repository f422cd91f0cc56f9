"""What a slot sends to the engine, and when it reads what comes back."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.errors import TrialError
from orchestrator.spec import parse_spec
from orchestrator.training.fast.engine import AHEAD, Figures
from orchestrator.training.fast.row import TABLE, Rows, Span
from orchestrator.training.fast.slot import Slot, dropout_key


class Late:
    """Figures that are not there until they are waited for."""

    is_there = False

    def __init__(self, loss: float) -> None:
        self._loss = loss
        self.was_read = False

    def read(self) -> Figures:
        self.was_read = True
        return Figures([0.0, self._loss], [0.0, 1.0], [0.0, 2.0])


class FakeEngine:
    """Keeps what it is sent."""

    max_tokens = 20

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.pending: list[Late] = []
        self.sick_from: float = math.inf

    def step(self, spans: Sequence[Span]) -> Late:
        self.spans.extend(spans)
        self.pending.append(Late(math.nan if len(self.pending) + 1 >= self.sick_from else 0.5))
        return self.pending[-1]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def slot(engine: FakeEngine, document: dict[str, Any], make_rows: Callable[..., Rows]) -> Any:
    """Slot 1, on rows of 7, 12, 5, 9 and 30 tokens."""
    spec = parse_spec(document | {"lora": {"rank": 8, "alpha": 4.0, "dropout": 0.2}})
    group = {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-7}
    trainer = SimpleNamespace(
        model=torch.nn.Module(),
        args=SimpleNamespace(seed=5, max_grad_norm=0.0),
        optimizer=SimpleNamespace(param_groups=[group]),
        state=SimpleNamespace(global_step=0),
    )
    rows = make_rows(7, 12, 5, 9, 30)
    return Slot(1, trainer, engine, spec.trial_config({}), rows, rows)  # type: ignore[arg-type]


def send(slot: Any, *batches: Sequence[int]) -> None:
    for indices in batches:
        slot.send(indices)
        slot.trainer.state.global_step += 1


def test_a_batch_that_is_too_long_is_sent_in_passes_of_which_the_last_applies(slot: Any, engine: FakeEngine) -> None:
    send(slot, [2, 1, 4, 0, 3])
    assert [list(span.indices) for span in engine.spans] == [[2, 1], [4], [0, 3]]
    assert [span.first_token for span in engine.spans] == [0, 17, 47]
    assert [span.table["applies"] for span in engine.spans] == [0, 0, 1]
    assert {span.table["loss_weight"] for span in engine.spans} == {1 / (63 - 5 * 2)}, "of the whole batch's tokens"
    assert {span.slot for span in engine.spans} == {1}


def test_the_table_says_what_the_trial_is(slot: Any, engine: FakeEngine) -> None:
    send(slot, [0], [1])
    first, second = (span.table for span in engine.spans)
    assert first.keys() == set(TABLE)
    assert (first["key"], second["key"]) == (dropout_key(5, 0), dropout_key(5, 1))
    assert second | {"key": 0} == {
        "key": 0,
        "threshold": round(0.2 * 2**31),
        "keep_scale": pytest.approx(1.25),
        "scale": 0.5,
        "loss_weight": pytest.approx(1 / 10),
        "applies": 1,
        "learning_rate": 3e-4,
        "decay": 0.1,
        "gain1": pytest.approx(0.2),
        "gain2": pytest.approx(0.01),
        "epsilon": 1e-7,
        "correction1": pytest.approx(1 - 0.8**2),
        "correction2": pytest.approx(1 - 0.99**2),
        "max_norm": math.inf,
    }
    assert (first["correction1"], first["correction2"]) == (pytest.approx(0.2), pytest.approx(0.01))


def test_figures_are_read_late_but_never_more_than_a_few_steps(slot: Any, engine: FakeEngine) -> None:
    for step in range(10):
        send(slot, [step % 4])
        assert [pending.was_read for pending in engine.pending] == [s < step + 1 - AHEAD for s in range(step + 1)]
    slot.collect()
    assert all(pending.was_read for pending in engine.pending)


def test_a_loss_that_is_not_finite_is_told_within_a_few_steps_with_its_step(slot: Any, engine: FakeEngine) -> None:
    engine.sick_from = 3
    with pytest.raises(TrialError, match="loss is nan at step 3"):
        send(slot, *[[0]] * 20)
    assert len(engine.pending) <= 3 + AHEAD


def test_no_two_steps_of_any_seed_share_a_key() -> None:
    seeds = [*range(40), 12345, 2**31, 2**32, 2**40 + 1, -1]
    keys = {dropout_key(seed, step) for seed in seeds for step in range(500)}
    assert len(keys) >= len(seeds) * 500 - 2, "by chance, one pair in about twenty such sets would meet"
    assert all(-(2**31) <= key < 2**31 for key in keys)

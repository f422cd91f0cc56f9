"""What a slot sends to the engine, and when it reads what comes back."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.errors import TrialError
from orchestrator.spec import parse_spec
from orchestrator.training.fast.drive.multi_lora import Batch
from orchestrator.training.fast.drive.slot import Slot, dropout_key
from orchestrator.training.fast.step.engine import AHEAD, StepMetrics
from orchestrator.training.fast.step.flat_batch import TABLE, TokenizedRows
from orchestrator.training.write_queue import WriteNow


class Late:
    """Figures that are not there until they are waited for."""

    is_there = False

    def __init__(self, loss: float) -> None:
        self._loss = loss
        self.was_read = False

    def read(self) -> StepMetrics:
        self.was_read = True
        return StepMetrics([0.0, self._loss], [0.0, 1.0], [0.0, 2.0])


class FakePack:
    """Keeps what it is given, and answers with figures that come late."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.pending: list[Late] = []
        self.sick_from: float = math.inf

    def answer(self, batch: Batch) -> list[Any]:
        self.batches.append(batch)
        self.pending.append(Late(math.nan if len(self.pending) + 1 >= self.sick_from else 0.5))
        return [self.pending[-1]]


@pytest.fixture
def pack() -> FakePack:
    return FakePack()


@pytest.fixture
def slot(document: dict[str, Any], make_rows: Callable[..., TokenizedRows]) -> Any:
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
    engine = SimpleNamespace(adapters=None)
    return Slot(1, trainer, engine, spec.trial_config({}), rows, rows, WriteNow())  # type: ignore[arg-type]


def send(slot: Any, pack: FakePack, *batches: Sequence[int]) -> None:
    for indices in batches:
        batch = slot.batch(list(indices))
        slot.sent(batch, pack.answer(batch))
        slot.trainer.state.global_step += 1


def test_a_batch_is_whole_and_weighs_all_of_its_tokens_however_long_it_is(slot: Any, pack: FakePack) -> None:
    send(slot, pack, [2, 1, 4, 0, 3])
    (batch,) = pack.batches
    assert list(batch.indices) == [2, 1, 4, 0, 3]
    assert batch.table["applies"] == 1
    assert batch.table["loss_weight"] == 1 / (63 - 5 * 2)
    assert batch.slot == 1
    assert batch.rows.longest == 30


def test_an_evaluation_asks_for_this_slot_and_its_scale(slot: Any, pack: FakePack) -> None:
    send(slot, pack, [0])
    held = slot.held_out()
    assert (held.slot, held.table["scale"], len(held.rows)) == (1, 0.5, 5)
    assert held.table.keys() == set(TABLE)


def test_figures_of_a_batchs_passes_add_up(slot: Any) -> None:
    slot.sent(slot.batch([2, 1, 4]), [Late(0.5), Late(0.25), Late(0.125)])
    logs: list[dict[str, float]] = []
    slot.trainer.log = logs.append
    slot._rate_to_log = 1e-3
    slot._log()
    tokens = 5 + 12 + 30
    assert logs == [
        {
            "loss": 0.875,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "mean_token_accuracy": 3 * 2 / (tokens - 3 * 2),
            "num_tokens": tokens,
        }
    ]


def test_the_table_says_what_the_trial_is(slot: Any, pack: FakePack) -> None:
    send(slot, pack, [0], [1])
    first, second = (batch.table for batch in pack.batches)
    assert first.keys() == set(TABLE)
    assert (first["key"], second["key"]) == (dropout_key(5, 0), dropout_key(5, 1))
    assert second | {"key": 0} == {
        "key": 0,
        "threshold": round(0.2 * 2**31),
        "keep_scale": pytest.approx(1.25),
        "scale": 0.5,
        "rank": 8,
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


def test_figures_are_read_late_but_never_more_than_a_few_steps(slot: Any, pack: FakePack) -> None:
    for step in range(10):
        send(slot, pack, [step % 4])
        assert [pending.was_read for pending in pack.pending] == [s < step + 1 - AHEAD for s in range(step + 1)]
    slot.collect()
    assert all(pending.was_read for pending in pack.pending)


def test_the_next_batch_is_sent_before_the_last_ones_figures_are_waited_for(slot: Any, pack: FakePack) -> None:
    """The device works while the host tells of them; they are still those of their own step, at its own rate."""
    trainer, told = slot.trainer, []

    def tell(_: Any, state: Any, control: Any) -> Any:
        return SimpleNamespace(**vars(control) | {"should_log": state.global_step in (2, 5)})

    trainer.control = SimpleNamespace(
        should_log=False, should_evaluate=False, should_save=False, should_epoch_stop=False, should_training_stop=False
    )
    events = ("train_begin", "epoch_begin", "step_begin", "step_end", "epoch_end", "train_end")
    trainer.callback_handler = SimpleNamespace(**dict.fromkeys((f"on_{event}" for event in events), tell))
    trainer.lr_scheduler = SimpleNamespace(
        step=lambda: trainer.optimizer.param_groups[0].update(lr=trainer.state.global_step)
    )
    trainer.args.gradient_accumulation_steps = 1
    trainer.log = lambda logs: told.append((trainer.state.global_step, len(pack.batches), logs.get("learning_rate")))
    slot._store = lambda: None
    loader = SimpleNamespace(set_epoch=lambda _: None, batch_sampler=[[index] for index in range(5)])
    slot.begin = lambda _: slot._batches(loader, range(1), 0, 5)
    work = slot.train(None)
    with suppress(StopIteration):
        batch = next(work)
        while True:
            batch = work.send(pack.answer(batch))
    assert told == [(2, 3, 0), (5, 5, 3), (5, 5, None)], "step, batches sent by then, rate"


def test_a_loss_that_is_not_finite_is_told_within_a_few_steps_with_its_step(slot: Any, pack: FakePack) -> None:
    pack.sick_from = 3
    with pytest.raises(TrialError, match="loss is nan at step 3"):
        send(slot, pack, *[[0]] * 20)
    assert len(pack.pending) <= 3 + AHEAD


def test_no_two_steps_of_any_seed_share_a_key() -> None:
    seeds = [*range(40), 12345, 2**31, 2**32, 2**40 + 1, -1]
    keys = {dropout_key(seed, step) for seed in seeds for step in range(500)}
    assert len(keys) >= len(seeds) * 500 - 2, "by chance, one pair in about twenty such sets would meet"
    assert all(-(2**31) <= key < 2**31 for key in keys)

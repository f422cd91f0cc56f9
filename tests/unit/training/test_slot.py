"""What a slot sends to the engine, and when it reads the metrics that come back."""

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


class LateMetrics:
    """Metrics that never arrive before they are waited for."""

    is_ready = False

    def __init__(self, loss: float) -> None:
        self._loss = loss
        self.was_read = False

    def read(self) -> StepMetrics:
        self.was_read = True
        return StepMetrics([0.0, self._loss], [0.0, 1.0], [0.0, 2.0])


class FakeMultiLora:
    """Keeps the batches that it receives, and answers with metrics that arrive late."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.pending: list[LateMetrics] = []
        self.nan_from: float = math.inf

    def answer(self, batch: Batch) -> list[Any]:
        self.batches.append(batch)
        self.pending.append(LateMetrics(math.nan if len(self.pending) + 1 >= self.nan_from else 0.5))
        return [self.pending[-1]]


@pytest.fixture
def multi_lora() -> FakeMultiLora:
    return FakeMultiLora()


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


def send(slot: Any, multi_lora: FakeMultiLora, *batches: Sequence[int]) -> None:
    for indices in batches:
        batch = slot.batch(list(indices))
        slot.sent(batch, multi_lora.answer(batch))
        slot.trainer.state.global_step += 1


def test_a_batch_is_sent_whole_and_its_loss_is_averaged_over_all_of_its_tokens(
    slot: Any, multi_lora: FakeMultiLora
) -> None:
    send(slot, multi_lora, [2, 1, 4, 0, 3])
    (batch,) = multi_lora.batches
    assert list(batch.indices) == [2, 1, 4, 0, 3]
    assert batch.table["applies"] == 1
    assert batch.table["loss_weight"] == 1 / (63 - 5 * 2)
    assert batch.slot == 1
    assert batch.rows.longest == 30


def test_an_evaluation_has_this_slot_and_its_scale(slot: Any, multi_lora: FakeMultiLora) -> None:
    send(slot, multi_lora, [0])
    evaluation = slot.evaluation()
    assert (evaluation.slot, evaluation.table["scale"], len(evaluation.rows)) == (1, 0.5, 5)
    assert evaluation.table.keys() == set(TABLE)


def test_metrics_of_the_passes_of_a_batch_add_up(slot: Any) -> None:
    slot.sent(slot.batch([2, 1, 4]), [LateMetrics(0.5), LateMetrics(0.25), LateMetrics(0.125)])
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


def test_the_table_holds_the_trials_hyperparameters(slot: Any, multi_lora: FakeMultiLora) -> None:
    send(slot, multi_lora, [0], [1])
    first, second = (batch.table for batch in multi_lora.batches)
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
        "weight_decay": 0.1,
        "one_minus_beta1": pytest.approx(0.2),
        "one_minus_beta2": pytest.approx(0.01),
        "epsilon": 1e-7,
        "bias_correction1": pytest.approx(1 - 0.8**2),
        "bias_correction2": pytest.approx(1 - 0.99**2),
        "max_norm": math.inf,
    }
    assert (first["bias_correction1"], first["bias_correction2"]) == (pytest.approx(0.2), pytest.approx(0.01))


@pytest.mark.parametrize(("ranks", "largest"), [({}, 8), ({"q_proj": 12}, 12), ({".*_proj": 5, "k": 9}, 5)])
def test_kernels_are_told_the_largest_rank_of_the_layers(
    document: dict[str, Any], slot: Any, ranks: dict[str, int], largest: int
) -> None:
    lora = {"rank": 8, "alpha": 4.0, "rank_pattern": ranks}
    names = [f"base_model.model.layers.0.{layer}.lora_A.default.weight" for layer in ("q_proj", "v_proj")]
    model = SimpleNamespace(named_modules={}.items, named_parameters=dict.fromkeys(names).items)
    slot.trainer.model = model
    config = parse_spec(document | {"lora": lora}).trial_config({})
    rows = slot.batch([0]).rows
    made = Slot(1, slot.trainer, SimpleNamespace(adapters=None), config, rows, rows, WriteNow())  # type: ignore[arg-type]
    table = made.batch([0]).table
    assert (table["rank"], table["scale"]) == (largest, 0.5)


def test_metrics_are_read_at_most_a_few_steps_late(slot: Any, multi_lora: FakeMultiLora) -> None:
    for step in range(10):
        send(slot, multi_lora, [step % 4])
        assert [pending.was_read for pending in multi_lora.pending] == [s < step + 1 - AHEAD for s in range(step + 1)]
    slot.collect()
    assert all(pending.was_read for pending in multi_lora.pending)


def test_the_next_batch_is_sent_before_the_last_ones_metrics_are_awaited(slot: Any, multi_lora: FakeMultiLora) -> None:
    """The device works while the host logs them. They are logged with their own step and learning rate."""
    trainer, logged = slot.trainer, []

    def call(_: Any, state: Any, control: Any) -> Any:
        return SimpleNamespace(**vars(control) | {"should_log": state.global_step in (2, 5)})

    trainer.control = SimpleNamespace(
        should_log=False, should_evaluate=False, should_save=False, should_epoch_stop=False, should_training_stop=False
    )
    events = ("train_begin", "epoch_begin", "step_begin", "step_end", "epoch_end", "train_end")
    trainer.callback_handler = SimpleNamespace(**dict.fromkeys((f"on_{event}" for event in events), call))
    trainer.lr_scheduler = SimpleNamespace(
        step=lambda: trainer.optimizer.param_groups[0].update(lr=trainer.state.global_step)
    )
    trainer.args.gradient_accumulation_steps = 1
    trainer.log = lambda logs: logged.append(
        (trainer.state.global_step, len(multi_lora.batches), logs.get("learning_rate"))
    )
    slot._copy_to_model = lambda: None
    loader = SimpleNamespace(set_epoch=lambda _: None, batch_sampler=[[index] for index in range(5)])
    slot.begin = lambda _: slot._batches(loader, range(1), 0, 5)
    work = slot.train(None)
    with suppress(StopIteration):
        batch = next(work)
        while True:
            batch = work.send(multi_lora.answer(batch))
    assert logged == [(2, 3, 0), (5, 5, 3), (5, 5, None)], "step, batches sent by then, rate"


def test_a_loss_that_is_not_finite_raises_within_a_few_steps_and_names_its_step(
    slot: Any, multi_lora: FakeMultiLora
) -> None:
    multi_lora.nan_from = 3
    with pytest.raises(TrialError, match="loss is nan at step 3"):
        send(slot, multi_lora, *[[0]] * 20)
    assert len(multi_lora.pending) <= 3 + AHEAD


def test_no_two_steps_of_any_seed_share_a_key() -> None:
    seeds = [*range(40), 12345, 2**31, 2**32, 2**40 + 1, -1]
    keys = {dropout_key(seed, step) for seed in seeds for step in range(500)}
    assert len(keys) >= len(seeds) * 500 - 2, "by chance, one pair in about twenty such sets would meet"
    assert all(-(2**31) <= key < 2**31 for key in keys)

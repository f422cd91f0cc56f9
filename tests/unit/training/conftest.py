"""Fixtures of the training tests: rows of tokens, a slot's table, a flat batch, and the embedded base."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.base import load_base
from orchestrator.spec import TrialConfig, parse_spec
from orchestrator.spec.sections import BaseSection
from orchestrator.training.fast.ops.reference import TILE
from orchestrator.training.fast.step.flat_batch import BucketShape, FlatBatch, Span, TokenizedRows

MakeRows = Callable[..., TokenizedRows]
MakeTable = Callable[..., dict[str, float]]
MakeRow = Callable[..., FlatBatch]
MakeConfig = Callable[..., TrialConfig]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread, because more would only wait for each other with matrices this small."""
    torch.set_num_threads(1)


@pytest.fixture
def seed() -> None:
    """Seed PyTorch's random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def make_rows() -> MakeRows:
    """`make_rows(5, 9, seed=1)`: rows of these lengths. Their first two tokens have no loss."""

    def make(*lengths: int, seed: int = 0, vocabulary: int = 90) -> TokenizedRows:
        generator = np.random.default_rng(seed)
        ids = [generator.integers(0, vocabulary, length).tolist() for length in lengths]
        return TokenizedRows(ids, [[-100, -100, *row[2:]] for row in ids])

    return make


@pytest.fixture
def make_table() -> MakeTable:
    """`make_table(dropout=0.1, step=3, learning_rate=1e-3)`: a slot's table at its third step."""

    def make(dropout: float = 0.0, step: int = 1, **values: float) -> dict[str, float]:
        return {
            "key": 12345,
            "threshold": round(dropout * 2**31),
            "keep_scale": 1 / (1 - dropout),
            "scale": 2.0,
            "rank": 16,
            "loss_weight": 0.1,
            "applies": 1,
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "one_minus_beta1": 1 - 0.9,
            "one_minus_beta2": 1 - 0.999,
            "epsilon": 1e-8,
            "bias_correction1": 1 - 0.9**step,
            "bias_correction2": 1 - 0.999**step,
            "max_norm": float("inf"),
        } | values

    return make


@pytest.fixture
def make_row() -> MakeRow:
    """`make_row(span, ..., num_slots=2, num_tokens=64)`: a flat batch of these spans, as short as possible."""

    def make(*spans: Span, num_slots: int = 1, num_tokens: int = 0, num_sequences: int = 32) -> FlatBatch:
        used = sum(span.num_tokens + -span.num_tokens % TILE for span in spans)
        longest = max([40, *(span.rows.longest for span in spans)])
        tokens = max(used, num_tokens)
        layout = BucketShape(tokens, tokens, num_sequences, num_slots, TILE, longest)
        buffer = layout.buffer("cpu")
        layout.fill(buffer.numpy(), spans)
        return layout.view(buffer)

    return make


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide GPUs, so that the tests run on the CPU on every machine."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def base() -> Any:
    """The embedded base in NF4, without an adapter, as in a trial of the demo. A test that adapts it uses a copy."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "device_count", lambda: 0)
        return load_base(BaseSection(model="embedded", compute_dtype="float32"))


@pytest.fixture
def trial(document: dict[str, Any]) -> MakeConfig:
    """`trial(lora={"rank": 4}, training={...})`: a trial's configuration on the embedded base in float32."""

    def make(**sections: dict[str, Any]) -> TrialConfig:
        base = {"model": "embedded", "compute_dtype": "float32"} | sections.pop("base", {})
        return parse_spec(document | {"base": base} | sections).trial_config({})

    return make

"""Train a small base of each family with both engines; reload, export and merge the adapter with plain libraries."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from both_engines import train
from family_cases import FAMILY_CASES
from peft import PeftModel
from plain import loss_of, plain_base
from tiny import Witness
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.data import load
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.export import export
from orchestrator.embedded import BASE_DIR
from orchestrator.record import SweepPaths, read_sweep
from orchestrator.spec import SweepSpec
from orchestrator.training.local import run_local_trial

pytestmark = pytest.mark.long

Tiny = Callable[..., SweepSpec]

SHORT = [
    "base.compute_dtype=float32", "data.max_rows=48", "data.held_out={count: 16}", "data.max_length=64",
    "training.steps=4", "training.eval_steps=4", "training.learning_rate=5e-3", "lora.rank=4", "lora.dropout=0",
]  # fmt: skip


EXCEPT_ONE_IN = 500
"""Share of weights that may be further apart.

AdamW divides a gradient by its own size. Where the terms of a gradient cancel, only rounding is left of it, and yet the
weight moves by up to the learning rate: with a gradient of 4e-9 where others are 1e-2, one weight of 7,808 was apart by
1.8e-5 of the whole update's norm, and all others together by 3e-7."""


def saved_base(name: str, folder: Path) -> list[str]:
    """Save a base with random weights and the embedded base's tokenizer, and return the overrides that name it."""
    config, quantization = FAMILY_CASES[name]
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    config = deepcopy(config)
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # because a new model has biases of 0 and norms of 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in BASE_DIR.glob("*template*"):
        shutil.copy(file, folder)
    return [f"base.model={folder}", f"base.quantization={quantization}"]


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_both_engines_train_the_same(name: str, tmp_path: Path) -> None:
    base = saved_base(name, tmp_path / "base")
    fast, exact = (train(engine, tmp_path / engine, *SHORT, *base) for engine in ("fast", "trl"))
    assert fast.column("loss") == pytest.approx(exact.column("loss"), rel=1e-6)
    assert fast.column("grad_norm") == pytest.approx(exact.column("grad_norm"), rel=1e-6)
    apart = (fast.update - exact.update).abs().sort().values / exact.update.norm()
    assert apart.norm() <= 1e-4
    assert apart[: -len(apart) // EXCEPT_ONE_IN].norm() <= 1e-6


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_adapters_are_reloaded_and_merged(name: str, tiny: Tiny, folder: SweepPaths, tmp_path: Path) -> None:
    overrides = saved_base(name, tmp_path / "base")
    result = run_local_trial(tiny(*SHORT, *overrides), folder, Witness())
    assert result is not None
    assert (result.engine, result.engine_reason) == ("fast", None)
    assert result.best is not None
    record, rows = read_sweep(folder.root), load(folder.data).held_out
    # transformers alone does not quantize experts: it gets the values that they have after it.
    plain = plain_base(tmp_path / "base", FAMILY_CASES[name][1])
    reloaded = PeftModel.from_pretrained(plain, str(record.adapter(result)))
    assert loss_of(reloaded, rows) == pytest.approx(result.best.value, rel=1e-6)
    merged = tmp_path / "merged"
    # fp16 rounds less than bf16, whose rounding of random weights exceeds the bound for trained ones.
    export(AdapterRef.of_trial(record, result), merged, "merged", dtype="fp16")
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert loss_of(model, rows) == pytest.approx(result.best.value, rel=2e-3)

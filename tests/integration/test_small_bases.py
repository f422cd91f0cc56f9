"""Bases whose files or layers differ from Llama's, in every verb: train, evaluate, export, merge, answer, serve."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_bases import save_fp8, save_quantized, save_small_base
from tiny import DEMO, TINY, Witness
from transformers import BitsAndBytesConfig

from orchestrator.deploy import FinishedSweep, open_sweep
from orchestrator.deploy.chat import Sampling, open_chat
from orchestrator.deploy.export.export import export
from orchestrator.deploy.scoring.evaluate import evaluate, own_rows
from orchestrator.deploy.scoring.forms import FORMS
from orchestrator.deploy.serving.adapter_server import AdapterServer, BatchingServer, SingleServer, open_adapter_servers
from orchestrator.errors import RequestError, TrialError
from orchestrator.record import SweepPaths, TrialResult, TrialState
from orchestrator.spec import load_spec
from orchestrator.training.local import run_local_trial

pytestmark = pytest.mark.slow

SHORT = [
    "training.steps=4", "training.eval_steps=2", "training.save_steps=2", "data.max_rows=60",
    "data.held_out={count: 10}", "search={algorithm: random, num_trials: 1}", "scheduler={kind: none}",
    "evaluation.metrics=[exact_match]", "evaluation.rows=3",
]  # fmt: skip
QUESTION = "What is the total of 1 and 2?"


def train(base: Path, folder: Path, engine: str, *overrides: str) -> tuple[TrialResult, FinishedSweep, list[str]]:
    """Train one short trial; return its result, its sweep, and what was said."""
    experiment = [*TINY, *SHORT, f"base.model={base}", f"training.engine={engine}", *overrides]
    witness = Witness()
    result = run_local_trial(load_spec(DEMO, experiment), SweepPaths(folder), witness)
    assert result is not None
    assert result.state == TrialState.COMPLETE
    return result, open_sweep(folder), witness.said


STORED = {
    "layers left out": {"llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn"]},
    "single": {"bnb_4bit_use_double_quant": False},
    "another compute type": {"bnb_4bit_compute_dtype": torch.float16},
    "4-bit head": {"llm_int8_skip_modules": ["nothing"]},
    "fp8": None,
}


@pytest.mark.parametrize("kind", STORED)
def test_both_engines_train_on_stored_quantized_weights(kind: str, tmp_path: Path) -> None:
    changes = STORED[kind]
    if changes is None:
        folder = save_fp8(tmp_path / "stored")
    else:
        settings: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = BitsAndBytesConfig(load_in_4bit=True, **(settings | changes))
        folder = save_quantized(save_small_base("llama", tmp_path / "base"), tmp_path / "stored", config)
    losses = []
    for engine in ("fast", "trl"):
        result, sweep, said = train(folder, tmp_path / engine, engine)
        assert result.engine == engine
        assert result.applied is not None
        assert result.applied["base.quantization"] == (["nf4", "none"] if kind == "layers left out" else "nf4")
        assert any("cannot be merged" in line for line in said)
        assert result.best is not None
        losses.append(result.best.value)
        adapter = sweep.best().adapter_ref()
        copy = export(adapter, tmp_path / f"{engine}-copy", "adapter")
        assert copy.parity.difference < 5e-4
        with pytest.raises(RequestError, match=r"contain quantized weights \(\w+\), which cannot be merged"):
            export(adapter, tmp_path / f"{engine}-merged", "merged")
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen3_vl", "qwen3_5", "qwen3_5_text", "mamba"])
def test_a_family_is_right_in_every_verb(family: str, tmp_path: Path) -> None:
    folder = save_small_base(family, tmp_path / "base")
    adapted = ["lora.target_modules=[in_proj, x_proj]", "training.learning_rate=0.1"] if family == "mamba" else []
    result, sweep, _ = train(folder, tmp_path / "sweep", "auto", *adapted)
    assert result.engine == ("fast" if family in ("gemma3", "mistral3") else "trl")
    adapter = sweep.best().adapter_ref()
    for format in ("adapter", "merged"):
        assert export(adapter, tmp_path / format, format).parity.is_seen  # type: ignore[arg-type]
    report = evaluate([adapter], own_rows(adapter), ["exact_match"])
    assert {each.form for each in report.evaluations} == {"adapter", *FORMS}
    chat = open_chat(adapter)
    expected = "".join(chat.stream(QUESTION, 8))
    with open_adapter_servers([adapter]) as (server,):
        assert type(server) is (SingleServer if family.startswith(("qwen3_5", "mamba")) else BatchingServer)
        # A last token that is part of a character is shown by chat alone.
        assert asyncio.run(text_of(server, 8)) == expected.strip().rstrip("\ufffd")


async def text_of(server: AdapterServer, max_new_tokens: int) -> str:
    pieces = [piece async for piece in server.answer(server.form.ids(QUESTION), max_new_tokens, Sampling(), strip=True)]
    assert pieces[-1].finish_reason in ("stop", "length")
    assert pieces[-1].num_tokens <= max_new_tokens
    return "".join(piece.text for piece in pieces)


def test_requests_that_cannot_be_batched_are_answered_in_turn(tmp_path: Path) -> None:
    """A request that is closed early frees the model for the next one."""
    _, sweep, _ = train(save_small_base("qwen3_5_text", tmp_path / "base"), tmp_path / "sweep", "trl")

    async def ask(server: AdapterServer) -> None:
        alone = await text_of(server, 6)
        assert await asyncio.gather(*(text_of(server, 6) for _ in range(3))) == [alone] * 3
        left = server.answer(server.form.ids(QUESTION), 400, Sampling())
        await anext(left)
        await left.aclose()
        assert await text_of(server, 6) == alone

    with open_adapter_servers([sweep.best().adapter_ref()]) as (server,):
        assert isinstance(server, SingleServer)
        assert "one by one" in (server.note or "")
        asyncio.run(ask(server))


def test_chat_prints_no_warnings_of_libraries(tmp_path: Path) -> None:
    """transformers warns at the first answer that it computes linear attention without its kernels."""
    train(save_small_base("qwen3_5_text", tmp_path / "base"), tmp_path / "sweep", "trl")
    command = [sys.executable, "-m", "orchestrator", "chat", "sweep", "--output", ".", "--prompt", QUESTION]
    done = subprocess.run([*command, "--max-new-tokens", "4"], cwd=tmp_path, capture_output=True, check=True)
    assert done.stderr == b""
    assert len(done.stdout.splitlines()) <= 4


def test_packed_rows_on_linear_attention_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """Without the package `causal_conv1d`, which needs a GPU, transformers cannot keep the rows apart."""
    folder = save_small_base("qwen3_5_text", tmp_path / "base")
    with pytest.raises(TrialError, match=r"data.packing: this base does not accept packed rows(.|\n)*packing: false"):
        train(folder, tmp_path / "sweep", "trl", "data.packing=true")

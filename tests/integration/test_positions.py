"""Trials whose rows are longer than their base has positions, or whose length changes the positions of other rows."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from one_trial import Tiny, curve, run
from tiny import Witness
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.deploy.finished import FinishedSweep
from orchestrator.deploy.scoring.evaluate import evaluate, own_rows
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import TrialError
from orchestrator.record import SweepPaths, read_sweep

pytestmark = pytest.mark.slow

LIMIT = 32
SHAPE: dict[str, Any] = {
    "vocab_size": 514, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": LIMIT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.3,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": LIMIT,
}  # fmt: skip
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
SCALED: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_parameters": DYNAMIC},
    "longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": LIMIT * 4},
}
ROWS = ["data.format=text", "data.template=", "data.loss_on=all", "data.max_length=64", "data.held_out={count: 8}"]
SHORT = ["training.steps=2", "training.eval_steps=2", "training.batch_size=4", "base.quantization=none"]


def settings(folder: Path, kind: str, lengths: list[int], **fields: Any) -> list[str]:
    """Save a random base and rows of these lengths (characters), and return the overrides that name them."""
    base = folder / "base"
    shutil.copytree(BASE_DIR, base)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **{**SHAPE, **({"num_key_value_heads": 2} if kind == "llama" else {}), **fields}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    lines = [json.dumps({"text": ("abcdefgh"[n % 8] + "12") * length}) + "\n" for n, length in enumerate(lengths)]
    (folder / "rows.jsonl").write_text("".join(lines))
    return [f"base.model={base}", f"data.source={folder / 'rows.jsonl'}", *ROWS, *SHORT]


@pytest.mark.parametrize("name", SCALED)
def test_an_evaluation_does_not_depend_on_its_batch_size(name: str, tmp_path: Path, tiny: Tiny) -> None:
    own = settings(tmp_path, "llama", [3, 5, 8, 9, 12, 14, 16, 17] * 3, **SCALED[name])
    found, said = {}, {}
    for size in (1, 4):
        witness, folder = Witness(), SweepPaths(tmp_path / "runs" / str(size))
        result = run(tiny(*own, f"training.eval_batch_size={size}"), folder, witness)
        assert result.engine == "trl"
        found[size], said[size] = [values["eval/loss"] for _, values in curve(folder) if "eval/loss" in values], result
        best = FinishedSweep(read_sweep(folder.root)).best().adapter_ref()
        report = evaluate([best], own_rows(best), ["loss"], ["adapter"])
        assert not report.warnings
        assert report.evaluations[0].values["loss"] == pytest.approx(found[size][-1], abs=1e-6)
    assert found[1] == pytest.approx(found[4], abs=1e-7)
    (warning,) = [each for each in said[4].warnings if "evaluated one by one" in each]
    assert f"a row of more than {LIMIT} tokens" in warning


def test_longer_rows_are_a_warning_where_positions_are_computed(tmp_path: Path, tiny: Tiny) -> None:
    own = settings(tmp_path, "llama", [3, 14, 5, 16] * 6)
    result = run(tiny(*own), SweepPaths(tmp_path / "run"))
    (warning,) = result.warnings
    assert warning == (
        f"data.max_length=64: 12 of 24 rows have more tokens (up to 50) than base {tmp_path / 'base'} has positions "
        f"({LIMIT}); it was not trained on such rows"
    )


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_longer_rows_are_an_error_where_positions_are_learned(kind: str, tmp_path: Path, tiny: Tiny) -> None:
    own = settings(tmp_path, kind, [3, 14, 5, 5] * 6, **(OPT if kind == "opt" else {}))
    with pytest.raises(TrialError, match=r"6 of 24 rows have more tokens \(up to 44\) .* and fails on them"):
        run(tiny(*own), SweepPaths(tmp_path / "run"))
    if kind == "opt":
        assert not run(tiny(*own, f"data.max_length={LIMIT}"), SweepPaths(tmp_path / "short")).warnings


def test_an_answer_without_room_is_an_error_at_the_start(tmp_path: Path, tiny: Tiny) -> None:
    own = settings(tmp_path, "opt", [3, 5] * 8, **OPT)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 16)
    own += ["data.format=prompt", "data.loss_on=completion", "evaluation.metrics=[exact_match]"]
    with pytest.raises(
        TrialError, match=r"evaluation\.max_new_tokens=30: a prompt has \d+ tokens, and prompt and answer"
    ):
        run(tiny(*own, "evaluation.max_new_tokens=30"), SweepPaths(tmp_path / "run"))
    run(tiny(*own, "evaluation.max_new_tokens=4"), SweepPaths(tmp_path / "short"))

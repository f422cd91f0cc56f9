"""Replacing an adapter folder: after a kill at any point, a complete adapter exists."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from orchestrator.adapters.bundle import Adapter, Origin, add_metrics, recover_interrupted_saves, save_adapter, verify
from orchestrator.base import load_tokenizer
from orchestrator.record import RowScores
from orchestrator.spec import parse_spec

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


class Killed(BaseException):
    """Simulates a kill. Handlers of `Exception` do not run, as in a killed process."""


@pytest.mark.parametrize(("operations", "value"), [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)])
def test_a_complete_adapter_exists_after_a_kill_at_any_point(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operations: int, value: float
) -> None:
    config = parse_spec(document).trial_config({})
    tokenizer, folder = load_tokenizer(config.base), tmp_path / "step-4"

    def save(weight: float) -> None:
        adapter = Adapter({NAME: torch.full((2, 8), weight)}, LoraConfig(r=2, inference_mode=True))
        origin = Origin(config, "t1", 4, "eval/loss", {"eval/loss": weight}, "f" * 64, [2])
        save_adapter(adapter, tokenizer, folder, origin, RowScores(losses=[0.5], hits=[1], tokens=[2]))

    save(1.0)
    with killed_after(operations, monkeypatch):
        save(2.0)
    recover_interrupted_saves(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert verify(folder).facts.metrics == {"eval/loss": value}
    assert load_file(folder / "adapter_model.safetensors")[NAME].eq(value).all()


@pytest.mark.parametrize(("operations", "answered"), [(0, False), (1, False), (2, True), (3, True)])
def test_answers_are_added_completely_or_not_at_all_after_a_kill(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operations: int, answered: bool
) -> None:
    config = parse_spec(document).trial_config({})
    folder = tmp_path / "step-4"
    adapter = Adapter({NAME: torch.ones(2, 8)}, LoraConfig(r=2, inference_mode=True))
    origin = Origin(config, "t1", 4, "eval/loss", {"eval/loss": 0.25}, "f" * 64, [2])
    save_adapter(adapter, load_tokenizer(config.base), folder, origin, RowScores(losses=[0.5], hits=[1], tokens=[2]))
    with killed_after(operations, monkeypatch):
        add_metrics(folder, "eval/loss", {"exact_match": [1.0, 0.0]})
    recover_interrupted_saves(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert ("eval/exact_match" in verify(folder).facts.metrics) == answered
    add_metrics(folder, "eval/loss", {"exact_match": [1.0, 0.0]})  # the resumed attempt adds them again
    assert verify(folder).facts.metrics["eval/exact_match"] == 0.5


@contextmanager
def killed_after(operations: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kill after this many of the three renames and removals that replace a folder."""
    done = 0

    def until_killed(operation: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if done == operations:
                raise Killed
            done += 1
            return operation(*arguments, **options)

        return do

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", until_killed(Path.rename))
        patched.setattr(shutil, "rmtree", until_killed(shutil.rmtree))
        with pytest.raises(Killed) if operations < 3 else nullcontext():
            yield

"""Every command rejects an invalid input with a message: exit code 2, no traceback, nothing written."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.bundle import WEIGHTS, Facts, seal
from orchestrator.cli import main
from orchestrator.record import SweepPaths
from orchestrator.spec import parse_spec

MakeSweep = Callable[..., SweepPaths]

SWEEP_COMMANDS = {
    "best": ["best", "{}"],
    "evaluate": ["evaluate", "{}"],
    "export": ["export", "{}", "--to", "out"],
    "serve": ["serve", "{}", "--port", "0", "--engine", "transformers"],
    "chat": ["chat", "{}", "--prompt", "x"],
}
ADAPTER_COMMANDS = {name: call for name, call in SWEEP_COMMANDS.items() if name != "best"}
BUNDLE_COMMANDS = {"verify": ["verify", "{}"], "push": ["push", "{}", "--repo", "me/x", "--dry-run"]}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`refused(call, target)`: the message of a command that exits with 2 and writes nothing."""
    monkeypatch.chdir(tmp_path)

    def call(arguments: list[str], target: Path | str) -> str:
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["orchestrator", *(each.format(target) for each in arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capsys.readouterr()
        assert exited.value.code == 2, err
        assert set(tmp_path.rglob("*")) == before
        assert "Traceback" not in out + err
        return str(err)

    return call


def adapter(folder: Path, document: dict[str, Any], model: str = "embedded", commit: str | None = None) -> Path:
    """Write a sealed bundle with invalid weights: no test loads them."""
    folder.mkdir()
    config = parse_spec(document | {"base": {"model": model}}).trial_config({})
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": model, "revision": commit})
    )
    (folder / WEIGHTS).write_bytes(b"weights")
    (folder / "trial.json").write_text(config.model_dump_json())
    base = config.base.model_dump(mode="json")
    seal(folder, Facts(format="adapter", base=base, config=config.model_dump(mode="json"), versions={}, metrics={}))
    return folder


@pytest.mark.parametrize("command", SWEEP_COMMANDS)
def test_a_sweep_without_a_finished_trial(tmp_path: Path, make_sweep: MakeSweep, refused: Any, command: str) -> None:
    sweep = make_sweep(tmp_path / "s", {"a": ("RUNNING", 0.5), "b": ("COMPLETE", None)})
    message = refused(SWEEP_COMMANDS[command], sweep.root)
    assert "no trial has finished with an evaluation yet" in message
    assert f"orchestrator status {sweep.root}" in message


@pytest.mark.parametrize("command", SWEEP_COMMANDS)
def test_a_sweep_whose_adapters_are_damaged(tmp_path: Path, make_sweep: MakeSweep, refused: Any, command: str) -> None:
    sweep = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)})
    file = sweep.trial("a").adapter(7) / WEIGHTS
    file.unlink()
    assert f"{file.parent}: is not a PEFT adapter folder ({WEIGHTS} is missing)" in refused(
        SWEEP_COMMANDS[command], sweep.root
    )


@pytest.mark.parametrize("command", [*ADAPTER_COMMANDS, *BUNDLE_COMMANDS])
def test_a_damaged_bundle(tmp_path: Path, document: dict[str, Any], refused: Any, command: str) -> None:
    bundle = adapter(tmp_path / "bundle", document)
    (bundle / WEIGHTS).write_bytes(b"Weights")
    assert f"{bundle / WEIGHTS}: has changed since it was saved" in refused(
        (ADAPTER_COMMANDS | BUNDLE_COMMANDS)[command], bundle
    )


@pytest.mark.parametrize("command", ADAPTER_COMMANDS)
def test_no_sweep_or_adapter_exists(refused: Any, command: str) -> None:
    message = refused(ADAPTER_COMMANDS[command], "none")
    assert (
        "none: there is no such sweep or adapter (no sweep.json in none or runs/none, no adapter_config.json" in message
    )
    assert "Give a sweep's folder, its name together with --output, or an adapter's folder." in message


@pytest.mark.parametrize("command", BUNDLE_COMMANDS)
def test_no_bundle_exists(refused: Any, command: str) -> None:
    assert "none: there is no such folder" in refused(BUNDLE_COMMANDS[command], "none")


@pytest.mark.parametrize("command", ADAPTER_COMMANDS)
def test_an_export_that_is_not_an_adapter(tmp_path: Path, refused: Any, command: str) -> None:
    (tmp_path / "merged").mkdir()
    seal(tmp_path / "merged", Facts(format="merged", base={"model": "embedded"}, versions={}, metrics={}))
    assert "merged: is an export of format merged; a sweep or an adapter is needed" in refused(
        ADAPTER_COMMANDS[command], tmp_path / "merged"
    )


@pytest.mark.parametrize("command", ADAPTER_COMMANDS)
def test_a_base_at_a_missing_revision(tmp_path: Path, document: dict[str, Any], refused: Any, command: str) -> None:
    bundle = adapter(tmp_path / "bundle", document, "someone/small", "c0ffee")
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    rows = ["--data", str(tmp_path / "rows.jsonl")] if command in ("evaluate", "export") else []
    message = refused([*ADAPTER_COMMANDS[command], *rows], bundle)
    assert "base.model someone/small at revision c0ffee: cannot be loaded" in message
    assert "hf download someone/small --revision c0ffee" in message


def test_an_existing_target(tmp_path: Path, make_sweep: MakeSweep, document: dict[str, Any], refused: Any) -> None:
    sweep = make_sweep(tmp_path / "s", {"a": ("COMPLETE", 0.5)})
    folder = sweep.trial("a").adapter(7)
    shutil.rmtree(folder)
    adapter(folder, document)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for call in (SWEEP_COMMANDS["export"], ["best", "{}", "--export", "out"]):
        assert "out: already exists" in refused(call, sweep.root)
    (tmp_path / "p.txt").write_text("x\n")
    (tmp_path / "answers.jsonl").touch()
    files = ["chat", "{}", "--prompts", "p.txt", "--answers", "answers.jsonl"]
    assert "answers.jsonl: already exists" in refused(files, sweep.root)

"""Make a wrong call, and check that it is refused."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from tests.unit.wrong_calls.calls import EXPERIMENT, Wrong


@pytest.fixture
def work(tmp_path: Path, make_sweep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an experiment, an open sweep, a finished one, a damaged one and half an adapter."""
    (tmp_path / "x.yaml").write_text(EXPERIMENT, encoding="utf-8")
    make_sweep(tmp_path / "sweeps" / "open", {"a": ("RUNNING", 0.5)})
    done = make_sweep(tmp_path / "sweeps" / "done", {"a": ("COMPLETE", 0.5)})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (done.trial("a").adapter(7) / name).write_text("{}", encoding="utf-8")
    (tmp_path / "sweeps" / "damaged").mkdir()
    (tmp_path / "sweeps" / "damaged" / "sweep.json").write_text('{"name": ', encoding="utf-8")
    (tmp_path / "sweeps" / "half").mkdir()
    (tmp_path / "sweeps" / "half" / "adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a trial here sets it for its process
    return tmp_path


@pytest.fixture
def assert_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[Wrong], None]:
    """Make a call and check: exit code 2, one message with the expected words, and nothing written."""

    def assert_refused(wrong: Wrong) -> None:
        for name, content in wrong.files.items():
            (work / name).write_bytes(content.encode() if isinstance(content, str) else content)
        before = contents(work)
        monkeypatch.setattr(sys, "argv", ["orchestrator", *wrong.call])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        assert exit_.value.code == 2
        for word in wrong.words:
            assert word in err
        assert "Traceback" not in err
        assert without_work(out).strip() == ""  # `trial` may print an empty line here, see test_commands.py
        assert contents(work) == before

    return assert_refused


def without_work(printed: str) -> str:
    """Return what a command has printed without the lines that say what it is doing, such as `10:15:00 ... ...`."""
    return re.sub(r"^\d\d:\d\d:\d\d .* \.\.\.\n", "", printed, flags=re.MULTILINE)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file and folder below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}

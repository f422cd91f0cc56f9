"""llama.cpp's converter: where it is looked for, and what is said when it fails. `test_export` runs the real one."""

import sys
from pathlib import Path

import pytest

from orchestrator.deploy.shipping.gguf import CONVERTER, FILE, convert, find_converter
from orchestrator.errors import RequestError


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("LLAMA_CPP", raising=False)


def script(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONVERTER).write_text(f"#!{sys.executable}\n{text}\n")
    (folder / CONVERTER).chmod(0o755)
    return folder


def test_without_the_converter_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"convert_hf_to_gguf\.py is not installed .*LLAMA_CPP is not set") as told:
        find_converter()
    assert "Set LLAMA_CPP to a checkout" in told.value.remedy
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(RequestError, match=f"not in LLAMA_CPP={tmp_path}"):
        find_converter()


def test_the_converter_is_found_on_path_or_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    script(tmp_path / "bin", "")
    assert find_converter() == [str(tmp_path / "bin" / CONVERTER)]
    checkout = script(tmp_path / "checkout", "")
    monkeypatch.setenv("LLAMA_CPP", str(checkout))
    assert find_converter() == [sys.executable, str(checkout / CONVERTER)]


def test_without_the_package_to_read_it_back_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin", "")
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(RequestError, match="--format gguf needs the package gguf"):
        find_converter()


def test_the_converters_own_last_words_are_passed_on(tmp_path: Path) -> None:
    words = "Traceback (most recent call last):\n  File x\nNotImplementedError: BPE pre-tokenizer was not recognized"
    folder = script(tmp_path / "bin", f"import sys; print({words!r}, file=sys.stderr); sys.exit(3)")
    with pytest.raises(RequestError, match="ended with 3:\n") as told:
        convert([str(folder / CONVERTER)], tmp_path, tmp_path, "bf16")
    assert "NotImplementedError: BPE pre-tokenizer was not recognized" in told.value.message
    assert "File x" not in told.value.message
    assert "--format merged" in told.value.remedy


def test_a_converter_that_writes_nothing_has_failed(tmp_path: Path) -> None:
    folder = script(tmp_path / "bin", "")
    with pytest.raises(RequestError, match="ended with 0"):
        convert([str(folder / CONVERTER)], tmp_path, tmp_path, "bf16")
    assert not (tmp_path / FILE).exists()

"""llama.cpp's converter: how it is found and called, and messages on failure. `test_export` runs the real one."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base import load_tokenizer
from orchestrator.deploy.export.gguf import CONVERTER, FILE, convert, find_converter, pre_tokenizer
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection

DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture(autouse=True)
def no_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("LLAMA_CPP", raising=False)


def script(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONVERTER).write_text(f"#!{sys.executable}\n{text}\n")
    (folder / CONVERTER).chmod(0o755)
    return folder


def test_a_missing_converter_is_reported_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=r"convert_hf_to_gguf\.py is not installed .*LLAMA_CPP is not set") as caught:
        find_converter()
    assert "Set LLAMA_CPP to a checkout" in caught.value.remedy
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(RequestError, match=f"not in LLAMA_CPP={tmp_path}"):
        find_converter()


def test_the_converter_is_found_on_path_or_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentencepiece")
    script(tmp_path / "elsewhere", "")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / CONVERTER).symlink_to(tmp_path / "elsewhere" / CONVERTER)
    assert find_converter() == tmp_path / "elsewhere" / CONVERTER, "its modules are next to the real file"
    checkout = script(tmp_path / "checkout", "")
    monkeypatch.setenv("LLAMA_CPP", str(checkout))
    assert find_converter() == checkout / CONVERTER


@pytest.mark.parametrize("package", ["gguf", "sentencepiece"])
def test_a_missing_package_is_reported(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin", "")
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(RequestError, match=f"--format gguf needs the package {package}") as caught:
        find_converter()
    assert "qlora-orchestrator[gguf]" in caught.value.remedy


def model_with(folder: Path, splitter: Any, **bpe: Any) -> Path:
    """Write the embedded tokenizer with another pre-tokenizer."""
    folder.mkdir(exist_ok=True)
    document = json.loads((BASE_DIR / "tokenizer.json").read_text())
    document["model"].update(bpe)
    (folder / "tokenizer.json").write_text(json.dumps(document | {"pre_tokenizer": splitter}))
    return folder


def test_a_pre_tokenizer_is_recognized_by_its_parts(tmp_path: Path) -> None:
    assert pre_tokenizer(BASE_DIR) == "smollm"
    assert pre_tokenizer(model_with(tmp_path, BYTES)) == "gpt-2"
    assert pre_tokenizer(model_with(tmp_path, {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]})) == "smollm"
    for other in (
        None,
        DIGITS,
        BYTES | {"add_prefix_space": True},
        {"type": "Sequence", "pretokenizers": [BYTES, DIGITS]},
        {"type": "Sequence", "pretokenizers": [DIGITS | {"individual_digits": False}, BYTES]},
    ):
        assert pre_tokenizer(model_with(tmp_path, other)) is None
    assert pre_tokenizer(model_with(tmp_path, BYTES, ignore_merges=True)) is None
    (tmp_path / "tokenizer.json").unlink()
    assert pre_tokenizer(tmp_path) is None


IN_ONE_FILE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        if tokenizer == "published":
            return "llama-bpe"
        raise NotImplementedError("BPE pre-tokenizer was not recognized")
ModelBase = type("ModelBase", (), {"__module__": __name__})
"""
MAIN = """
import json, sys
from pathlib import Path
def main():
    found = [TextModel().get_vocab_base_pre(name) for name in ("published", "new")]
    Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps([*found, *sys.argv[1:]]))
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("package", [False, True])
def test_the_converter_gets_the_name_of_an_unknown_pre_tokenizer(tmp_path: Path, package: bool) -> None:
    folder = script(
        tmp_path / "checkout", ("from conversion import ModelBase, TextModel" if package else IN_ONE_FILE) + MAIN
    )
    if package:
        (folder / "conversion").mkdir()
        (folder / "conversion" / "__init__.py").write_text("from .base import ModelBase, TextModel")
        (folder / "conversion" / "base.py").write_text(IN_ONE_FILE)
    shutil.copyfile(BASE_DIR / "tokenizer.json", tmp_path / "tokenizer.json")
    convert(folder / CONVERTER, tmp_path, tmp_path, "fp16", "abc_00001", [2])
    written = json.loads((tmp_path / FILE).read_text())
    assert written[:2] == ["llama-bpe", "smollm"]
    assert written[2:] == [
        *(str(tmp_path), "--model-name", "abc_00001"),
        *("--outfile", str(tmp_path / FILE), "--outtype", "f16"),
    ]


SPECIAL_TOKENS = """
import json, sys
from pathlib import Path
from gguf import SpecialVocab

class Writer:
    written = {}
    def __getattr__(self, name):
        return lambda value: self.written.update({name: value})

def main():
    writer = Writer()
    vocab = SpecialVocab(Path(sys.argv[1]), n_vocab=600)
    vocab.add_to_gguf(writer, quiet=True)
    Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps(writer.written))
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("stops", "more"),
    [
        ([2], {}),
        ([513, 2], {"add_eot_token_id": 513}),
        ([2, 3], {"add_eot_token_id": 3}),  # also the padding token
        ([513, 514, 515, 2], {"add_eot_token_id": 513, "add_eom_token_id": 514}),
    ],
)
def test_stop_tokens_other_than_eos_are_written_into_the_file(
    tmp_path: Path, stops: list[int], more: dict[str, int]
) -> None:
    """The package gguf reads the embedded tokenizer, whose EOS is 2."""
    folder = script(tmp_path / "checkout", SPECIAL_TOKENS)
    model = tmp_path / "model"
    load_tokenizer(BaseSection(model="embedded")).save_pretrained(model)
    document = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(document | {"pre_tokenizer": None}))  # no pre-tokenizer to name
    convert(folder / CONVERTER, model, tmp_path, "fp16", "x", stops)
    written = json.loads((tmp_path / FILE).read_text())
    ends = {name: value for name, value in written.items() if name.removeprefix("add_")[:3] in ("eos", "eot", "eom")}
    assert ends == {"add_eos_token_id": 2, **more}


def test_the_last_lines_of_the_converter_are_quoted(tmp_path: Path) -> None:
    output = "Traceback (most recent call last):\n  File x\nNotImplementedError: BPE pre-tokenizer was not recognized"
    folder = script(tmp_path / "bin", f"import sys; print({output!r}, file=sys.stderr); sys.exit(3)")
    with pytest.raises(RequestError, match="failed with exit code 3:\n") as caught:
        convert(folder / CONVERTER, tmp_path, tmp_path, "bf16", "x", [2])
    assert "NotImplementedError: BPE pre-tokenizer was not recognized" in caught.value.message
    assert "File x" not in caught.value.message
    assert "--format merged" in caught.value.remedy


def test_a_converter_that_writes_no_file_has_failed(tmp_path: Path) -> None:
    folder = script(tmp_path / "bin", "")
    with pytest.raises(RequestError, match="failed with exit code 0"):
        convert(folder / CONVERTER, tmp_path, tmp_path, "bf16", "x", [2])
    assert not (tmp_path / FILE).exists()

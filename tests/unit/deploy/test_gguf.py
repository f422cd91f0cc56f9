"""llama.cpp's converter: where it is looked for, what it is told of a tokenizer, and what is said when it fails.
`test_export` runs the real one."""

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
    pytest.importorskip("sentencepiece")
    script(tmp_path / "elsewhere", "")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / CONVERTER).symlink_to(tmp_path / "elsewhere" / CONVERTER)
    assert find_converter() == tmp_path / "elsewhere" / CONVERTER, "beside it lies what it imports"
    checkout = script(tmp_path / "checkout", "")
    monkeypatch.setenv("LLAMA_CPP", str(checkout))
    assert find_converter() == checkout / CONVERTER


@pytest.mark.parametrize("package", ["gguf", "sentencepiece"])
def test_without_a_package_that_it_needs_nothing_is_begun(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "bin", "")
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(RequestError, match=f"--format gguf needs the package {package}") as told:
        find_converter()
    assert "qlora-orchestrator[gguf]" in told.value.remedy


def model_with(folder: Path, cut: Any, **bpe: Any) -> Path:
    """A folder with the embedded tokenizer, which cuts in another way."""
    folder.mkdir(exist_ok=True)
    document = json.loads((BASE_DIR / "tokenizer.json").read_text())
    document["model"].update(bpe)
    (folder / "tokenizer.json").write_text(json.dumps(document | {"pre_tokenizer": cut}))
    return folder


def test_a_pre_tokenizer_is_known_by_what_it_does(tmp_path: Path) -> None:
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
    told = [TextModel().get_vocab_base_pre(name) for name in ("published", "new")]
    Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps([*told, *sys.argv[1:]]))
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("package", [False, True])
def test_the_converter_is_told_what_it_does_not_find_itself(tmp_path: Path, package: bool) -> None:
    folder = script(
        tmp_path / "checkout", ("from conversion import ModelBase, TextModel" if package else IN_ONE_FILE) + MAIN
    )
    if package:
        (folder / "conversion").mkdir()
        (folder / "conversion" / "__init__.py").write_text("from .base import ModelBase, TextModel")
        (folder / "conversion" / "base.py").write_text(IN_ONE_FILE)
    shutil.copyfile(BASE_DIR / "tokenizer.json", tmp_path / "tokenizer.json")
    convert(folder / CONVERTER, tmp_path, tmp_path, "fp16", "abc_00001", [2])
    said = json.loads((tmp_path / FILE).read_text())
    assert said[:2] == ["llama-bpe", "smollm"]
    assert said[2:] == [
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
        ([2, 3], {"add_eot_token_id": 3}),  # which is the padding too
        ([513, 514, 515, 2], {"add_eot_token_id": 513, "add_eom_token_id": 514}),
    ],
)
def test_stop_tokens_beside_the_eos_are_written_into_the_file(
    tmp_path: Path, stops: list[int], more: dict[str, int]
) -> None:
    """By gguf's own reading of the embedded tokenizer, whose EOS is 2."""
    folder = script(tmp_path / "checkout", SPECIAL_TOKENS)
    model = tmp_path / "model"
    load_tokenizer(BaseSection(model="embedded")).save_pretrained(model)
    document = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(document | {"pre_tokenizer": None}))  # nothing else to tell
    convert(folder / CONVERTER, model, tmp_path, "fp16", "x", stops)
    written = json.loads((tmp_path / FILE).read_text())
    ends = {name: value for name, value in written.items() if name.removeprefix("add_")[:3] in ("eos", "eot", "eom")}
    assert ends == {"add_eos_token_id": 2, **more}


def test_the_converters_own_last_words_are_passed_on(tmp_path: Path) -> None:
    words = "Traceback (most recent call last):\n  File x\nNotImplementedError: BPE pre-tokenizer was not recognized"
    folder = script(tmp_path / "bin", f"import sys; print({words!r}, file=sys.stderr); sys.exit(3)")
    with pytest.raises(RequestError, match="ended with 3:\n") as told:
        convert(folder / CONVERTER, tmp_path, tmp_path, "bf16", "x", [2])
    assert "NotImplementedError: BPE pre-tokenizer was not recognized" in told.value.message
    assert "File x" not in told.value.message
    assert "--format merged" in told.value.remedy


def test_a_converter_that_writes_nothing_has_failed(tmp_path: Path) -> None:
    folder = script(tmp_path / "bin", "")
    with pytest.raises(RequestError, match="ended with 0"):
        convert(folder / CONVERTER, tmp_path, tmp_path, "bf16", "x", [2])
    assert not (tmp_path / FILE).exists()

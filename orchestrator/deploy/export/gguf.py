"""A merged model as one GGUF file, by llama.cpp's own converter."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.deploy.export.merge import DTYPES, Dtype
from orchestrator.errors import RequestError
from orchestrator.spec.optional_packages import require_package

CONVERTER = "convert_hf_to_gguf.py"
FILE = "model.gguf"

_OUT_TYPES: dict[Dtype, str] = {"bf16": "bf16", "fp16": "f16"}
_LINES_TOLD = 4

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS = {"gpt-2": [_BYTES], "smollm": [_DIGITS, _BYTES]}
"""By llama.cpp's names (`src/llama-vocab.cpp`): those that any vocabulary may have, as `tokenizer.json` writes them."""


def find_converter() -> Path:
    """llama.cpp's converter: in the checkout that LLAMA_CPP names, or on PATH.

    Raises:
        RequestError: it is not installed, or a package that it or the reading back needs is not.
    """
    checkout = os.environ.get("LLAMA_CPP")
    script = Path(checkout or "") / CONVERTER
    found = script if checkout and script.is_file() else None
    if found is None and (on_path := shutil.which(CONVERTER)):
        found = Path(on_path)
    if found is None:
        where = f"not in LLAMA_CPP={checkout}" if checkout else "LLAMA_CPP is not set"
        raise RequestError(
            f"--format gguf: llama.cpp's {CONVERTER} is not installed (not on PATH, and {where})",
            "Set LLAMA_CPP to a checkout of github.com/ggml-org/llama.cpp; or take `--format merged`.",
        )
    for package in ("gguf", "sentencepiece"):  # the latter is imported for any tokenizer
        require_package(package, "--format gguf", "gguf")
    return found.resolve()  # a link on PATH has not beside it what the converter imports


def convert(converter: Path, merged: Path, target: Path, dtype: Dtype, name: str, stops: Sequence[int]) -> None:
    """Write `FILE` into a folder that exists.

    Args:
        converter: from `find_converter`.
        merged: a merged model with its tokenizer.
        target: where to.
        dtype: of matrices; what has one dimension is float32.
        name: of the model, which the file tells; the converter's default is that of the folder.
        stops: ids at which answers are over, the tokenizer's EOS among them; the file has room for two more.

    Raises:
        RequestError: the converter does not know the model or its tokenizer.
    """
    cut = pre_tokenizer(merged)
    given = [cut or "", ",".join(map(str, stops))]
    told = ["-m", "orchestrator.deploy.export.converter", *given] if cut or len(stops) > 1 else []
    command = [sys.executable, *told, str(converter), str(merged), "--model-name", name]
    command += ["--outfile", str(target / FILE), "--outtype", _OUT_TYPES[dtype]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (target / FILE).is_file():
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and line[0] != " "]
        raise RequestError(
            f"--format gguf: {CONVERTER} ended with {done.returncode}:\n" + "\n".join(lines[-_LINES_TOLD:]),
            "llama.cpp knows certain models and tokenizers only; `--format merged` works with any.",
        )


def pre_tokenizer(model: Path) -> str | None:
    """llama.cpp's name for how a text is cut before bytes are merged; None: left to the converter to find out.

    Args:
        model: folder with its `tokenizer.json`, if it has one.
    """
    file = model / "tokenizer.json"
    if not file.is_file():
        return None
    document = json.loads(file.read_text(encoding="utf-8"))
    bpe, cut = document["model"], document["pre_tokenizer"] or {}
    plain = {"type": "BPE", "ignore_merges": False, "byte_fallback": False}
    if document["normalizer"] or any(bpe.get(key, value) != value for key, value in plain.items()):
        return None
    parts = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    parts = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    return next((name for name, known in _PRE_TOKENIZERS.items() if parts == known), None)


def load_gguf(folder: Path, dtype: Dtype, place: Any) -> Any:
    """The model of a GGUF file, by transformers, its weights in `dtype`.

    Args:
        folder: of the file.
        dtype: of the weights.
        place: transformers' `device_map`.

    Raises:
        RequestError: transformers does not read GGUF files of this kind of model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=FILE, dtype=getattr(torch, DTYPES[dtype]), device_map=place
        )
    except ValueError as error:  # "GGUF model with architecture ... is not supported yet."
        raise RequestError(
            f"--format gguf: the file cannot be read back, and so not be held against the adapter: {error}",
            f"Take `--format merged`, and run {CONVERTER} on it.",
        ) from error

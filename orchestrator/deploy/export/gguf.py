"""Convert a merged model to a GGUF file, with llama.cpp's own converter."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.deploy.dtypes import DTYPES, Dtype
from orchestrator.errors import RequestError
from orchestrator.spec.optional_packages import require_package

CONVERTER = "convert_hf_to_gguf.py"
FILE = "model.gguf"

_OUT_TYPES: dict[Dtype, str] = {"bf16": "bf16", "fp16": "f16"}
_NUM_LINES_SHOWN = 4
"""Last lines of the converter's output that an error message quotes."""

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS = {"gpt-2": [_BYTES], "smollm": [_DIGITS, _BYTES]}
"""llama.cpp's name (`src/llama-vocab.cpp`) -> the parts in `tokenizer.json`, of pre-tokenizers for any vocabulary."""


def find_converter() -> Path:
    """Find llama.cpp's converter, in the checkout that LLAMA_CPP names or on PATH.

    Raises:
        RequestError: the converter is not installed, or a package is missing that it or `load_gguf` needs.
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
            "Set LLAMA_CPP to a checkout of github.com/ggml-org/llama.cpp; or use `--format merged`.",
        )
    for package in ("gguf", "sentencepiece"):  # the converter imports sentencepiece for every tokenizer
        require_package(package, "--format gguf", "gguf")
    return found.resolve()  # the converter imports modules next to the real file


def convert(converter: Path, merged: Path, target: Path, dtype: Dtype, name: str, stops: Sequence[int]) -> None:
    """Write `FILE` into an existing folder.

    Args:
        converter: from `find_converter`.
        merged: folder of a merged model with its tokenizer.
        target: folder for the file.
        dtype: type of the matrices; one-dimensional weights are float32.
        name: name of the model, stored in the file; the converter's default is the name of the folder.
        stops: ids of the stop tokens, including the tokenizer's EOS. The file holds EOS and two more.

    Raises:
        RequestError: the converter does not support the model or its tokenizer.
    """
    pre_tokenizer_name = pre_tokenizer(merged)
    patched = []
    if pre_tokenizer_name or len(stops) > 1:
        patched = ["-m", "orchestrator.deploy.export.converter", pre_tokenizer_name or "", ",".join(map(str, stops))]
    command = [sys.executable, *patched, str(converter), str(merged), "--model-name", name]
    command += ["--outfile", str(target / FILE), "--outtype", _OUT_TYPES[dtype]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (target / FILE).is_file():
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and line[0] != " "]
        raise RequestError(
            f"--format gguf: {CONVERTER} failed with exit code {done.returncode}:\n"
            + "\n".join(lines[-_NUM_LINES_SHOWN:]),
            "llama.cpp supports only certain models and tokenizers; `--format merged` works with any.",
        )


def pre_tokenizer(model: Path) -> str | None:
    """Return llama.cpp's name of a model's pre-tokenizer; None if the converter has to recognize it by itself.

    Args:
        model: the model's folder; it may contain a `tokenizer.json`.
    """
    file = model / "tokenizer.json"
    if not file.is_file():
        return None
    document = json.loads(file.read_text(encoding="utf-8"))
    bpe, splitter = document["model"], document["pre_tokenizer"] or {}
    plain = {"type": "BPE", "ignore_merges": False, "byte_fallback": False}
    if document["normalizer"] or any(bpe.get(key, value) != value for key, value in plain.items()):
        return None
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    parts = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    return next((name for name, known in _PRE_TOKENIZERS.items() if parts == known), None)


def load_gguf(folder: Path, dtype: Dtype, device_map: Any) -> Any:
    """Load the model of a GGUF file with transformers.

    Args:
        folder: folder of the file.
        dtype: type of the loaded weights.
        device_map: as for transformers' `from_pretrained`.

    Raises:
        RequestError: transformers cannot read GGUF files of this model type.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=FILE, dtype=getattr(torch, DTYPES[dtype]), device_map=device_map
        )
    except ValueError as error:  # "GGUF model with architecture ... is not supported yet."
        raise RequestError(
            f"--format gguf: transformers cannot load the file, so it cannot be compared with the adapter: {error}",
            f"Use `--format merged`, and run {CONVERTER} on the result.",
        ) from error

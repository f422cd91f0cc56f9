"""A merge against PEFT's `merge_and_unload`: time, peak host memory and parity, each in a process of its own.

    python -m benchmarks.merge 7b --rows train.jsonl
    python -m benchmarks.merge 7b --rows train.jsonl --onto dequantized

The adapter is merged onto the original weights and onto the dequantized ones, which takes minutes each at 7B. For the
latter, PEFT gets the base that transformers has dequantized: on the 4-bit base it would quantize the result again.
The disk must have space for the base and two merged models.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Setting, main
from orchestrator.data import load, prepare, save
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.base_files import find_base_files
from orchestrator.deploy.export.merge import Onto, plan_merge
from orchestrator.deploy.export.parity import NUM_ROWS, ask, measure_parity
from orchestrator.spec.sections import BaseSection

RANK = 16


def measure(setting: Setting, onto: list[Onto]) -> dict[str, Any]:
    figures: dict[str, Any] = {"ways": {}}
    with tempfile.TemporaryDirectory(dir=setting.base.parent) as folder:
        work = Path(folder)
        make_adapter(setting.base, work / "adapter")
        config = setting.spec({}).trial_config({})
        save(prepare(config.data, config.base), work / "rows")
        for weights in onto:
            for way in ("peft", "ours"):
                figures["ways"][f"{way} {weights}"] = found = child(way, weights, setting.base, work)
                print(way, weights, found, flush=True)
                shutil.rmtree(work / "merged", ignore_errors=True)
            one, other = (figures["ways"][f"{way} {weights}"] for way in ("ours", "peft"))
            for name in ("seconds", "peak_host_gib"):
                figures[f"{weights}: {name}, ours of peft's"] = round(one[name] / other[name], 3)
            figures[f"{weights}: parity"] = one["parity"]
    return figures


def child(way: str, onto: str, base: Path, work: Path) -> dict[str, Any]:
    """Run one way in a new process. Return its seconds, from the start of Python to the last byte, and its peak."""
    os.sync()  # this process must not wait for earlier writes
    call = f"from benchmarks.merge import {way}; {way}({onto!r}, {str(base)!r}, {str(work)!r})"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", call], cwd=ROOT, check=True)
    seconds = time.monotonic() - start
    found = json.loads((work / "peak.json").read_text()) | {"seconds": round(seconds, 1)}
    if way == "ours":
        call = f"from benchmarks.merge import parity; parity({onto!r}, {str(base)!r}, {str(work)!r})"
        subprocess.run([sys.executable, "-c", call], cwd=ROOT, check=True)
        found["parity"] = json.loads((work / "parity.json").read_text())
    return found


def ours(onto: Onto, base: str, work: str) -> None:
    target = Path(work) / "merged"
    target.mkdir()
    plan_merge(subject_of(base, work), "bf16", onto).write(target)
    note_peak(work)


def peft(onto: Onto, base: str, work: str) -> None:
    """Merge as PEFT's documentation shows."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    from orchestrator.base import load_base

    model = load_base(section(base, onto))
    if onto == "dequantized":
        model = model.dequantize()
    merged = PeftModel.from_pretrained(model, f"{work}/adapter").merge_and_unload()
    merged.save_pretrained(f"{work}/merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(f"{work}/merged")
    note_peak(work)


def parity(onto: Onto, base: str, work: str) -> None:
    """Compare the merged model with the adapter on the base that it was merged onto."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from orchestrator.base import evict, load_base

    rows = load(Path(work) / "rows").held_out.select(range(NUM_ROWS))
    source = ask(PeftModel.from_pretrained(load_base(section(base, onto)), f"{work}/adapter"), rows)
    evict()
    where = {"": 0 if torch.cuda.is_available() else "cpu"}
    found = measure_parity(source, AutoModelForCausalLM.from_pretrained(f"{work}/merged", device_map=where), rows)
    (Path(work) / "parity.json").write_text(json.dumps(found.as_dict()))


def section(base: str, onto: Onto) -> BaseSection:
    return BaseSection(model=base, quantization="nf4" if onto == "dequantized" else "none")


def subject_of(base: str, work: str) -> AdapterRef:
    return AdapterRef("adapter", Path(work) / "adapter", section(base, "dequantized"), None, None)


def note_peak(work: str) -> None:
    """Write the peak memory of this process, including pages of mapped files (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    figures = {"peak_host_gib": round(int(line.split()[1]) / 2**20, 2)}
    (Path(work) / "peak.json").write_text(json.dumps(figures))


def make_adapter(base: Path, folder: Path) -> None:
    """Write a random adapter on all linear layers except the head. Its update is a few hundredths of the weights."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    matrices = {}
    for name, module in find_base_files(BaseSection(model=str(base))).blank().named_modules():
        if name.rpartition(".")[2] in names:
            key = f"base_model.model.{name}.lora_"
            matrices[f"{key}A.weight"] = torch.randn(RANK, module.in_features) / module.in_features**0.5
            matrices[f"{key}B.weight"] = torch.randn(module.out_features, RANK) * 0.005
    folder.mkdir()
    save_file(matrices, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM", inference_mode=True)
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))


if __name__ == "__main__":
    both = ["original", "dequantized"]
    main(
        __doc__.splitlines()[0],
        measure,
        onto={"nargs": "+", "choices": both, "default": both, "help": "weights to merge onto"},
    )

"""The share of a base's weights that are quantized, and its size."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_bases import base_config, base_model, save, write_base
from typer.testing import CliRunner

from orchestrator.base import load_base, model_class
from orchestrator.base_size import BaseSize
from orchestrator.cli import app
from orchestrator.spec.sections import BaseSection

DEMO = Path("experiments/demo.yaml")
WIDE = {"num_experts": 8, "moe_intermediate_size": 256, "hidden_size": 64}
"""A base most of whose weights are those of experts."""


def loaded(folder: Path, family: str, quantization: Any, **changes: Any) -> tuple[BaseSection, Any]:
    base = BaseSection(
        model=str(write_base(family, folder, **changes)), quantization=quantization, compute_dtype="bfloat16"
    )
    return base, load_base(base)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_the_size_is_measured_on_the_loaded_base(quantization: str, tmp_path: Path) -> None:
    _, model = loaded(tmp_path, "qwen3_moe", quantization, **WIDE)
    size = BaseSize.of(model)
    experts = 2 * 8 * 3 * 256 * 64
    attention = 2 * 64 * (32 + 32 + 16 + 16)
    total = base_model("qwen3_moe", **WIDE).num_parameters()
    quantized = {"nf4": experts + attention, "int8": attention, "none": 0}[quantization]
    assert size.quantized_share == pytest.approx(quantized / total)
    assert size.num_quantized + sum(size.plain.values()) == total
    per_weight = {"nf4": (0.51, 0.54), "int8": (1.0, 1.2), "none": (0, 0)}[quantization]
    plain = 2 * (total - quantized)
    assert plain + per_weight[0] * quantized <= size.num_bytes <= plain + per_weight[1] * quantized + 8_000


def test_bytes_are_those_of_the_tensors_that_torch_holds(tmp_path: Path) -> None:
    _, model = loaded(tmp_path, "qwen3_moe", "nf4", **WIDE)
    name = "model.layers.0.mlp.experts.down_proj"
    packed = model.get_parameter(name)
    codes = 8 * 64 * 256 // 2
    assert packed.untyped_storage().nbytes() == codes
    assert packed.scales.nbytes == 8 * (64 * 256 // 64 + 4 + 4) + 4 * (16 + 256)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_check_foresees_what_a_trial_measures(family: str, quantization: Any, tmp_path: Path) -> None:
    base, model = loaded(tmp_path, family, quantization)
    with torch.device("meta"):
        empty = model_class(base_config(family)).from_config(base_config(family))
    foreseen, measured = BaseSize.foreseen(base, empty), BaseSize.of(model)
    assert foreseen.num_quantized == measured.num_quantized
    assert foreseen.plain == measured.plain
    assert foreseen.quantized_share == pytest.approx(measured.quantized_share)
    assert foreseen.num_bytes == pytest.approx(measured.num_bytes, rel=0.1)


def test_a_base_of_which_little_is_quantized_is_warned_of(tmp_path: Path) -> None:
    base, model = loaded(tmp_path, "llama4_text", "nf4", hidden_size=64, intermediate_size=512)
    warning = BaseSize.of(model).warning(base)
    assert warning is not None
    assert "base.quantization nf4: only " in warning
    assert "not quantized are model.layers.*.feed_forward.experts.gate_up_proj (" in warning
    assert "(0%)" not in warning
    assert BaseSize.of(model).warning(base.model_copy(update={"quantization": "none"})) is None


def test_a_base_of_which_nearly_all_is_quantized_is_not_warned_of(tmp_path: Path) -> None:
    base, model = loaded(tmp_path, "qwen3_moe", "nf4", **WIDE | {"moe_intermediate_size": 1024})
    size = BaseSize.of(model)
    assert size.quantized_share > 0.9
    assert size.warning(base) is None
    assert size.say(base) == (
        f"{size.quantized_share:.0%} of its weights are in 4 bits, {1024 * size.gib:.3g} MiB in all"
    )
    assert BaseSize.of(load_base(BaseSection(model="embedded"))).warning(BaseSection(model="embedded")) is None


def checked(folder: Path, base: str, *overrides: str) -> list[str]:
    """Return the notes that `check` prints for a base."""
    file = folder / "one.yaml"
    file.write_text(
        f"base: {base}\ndata: {{source: embedded, format: template, template: '{{question}} {{answer}}'}}\n"
        "training: {steps: 2}\n"
    )
    options = [word for each in overrides for word in ("--set", each)]
    answer = CliRunner().invoke(app, ["check", str(file), *options])
    assert answer.exit_code == 0, answer.output
    notes = [line.removeprefix("# note: ") for line in answer.stdout.splitlines() if line.startswith("# note: ")]
    return [note for note in notes if not note.startswith("data.max_length")]


def test_check_says_how_much_of_a_base_with_experts_is_quantized(tmp_path: Path) -> None:
    base = save(base_model("qwen3_moe", **WIDE | {"moe_intermediate_size": 1024}), tmp_path / "base")
    (note,) = checked(tmp_path, f"{{model: {base}, quantization: nf4}}")
    said = rf"base.model {base}: has experts; after loading, 9\d% of its weights are in 4 bits, .* MiB in all"
    assert re.fullmatch(said, note)
    (note,) = checked(tmp_path, f"{{model: {base}, quantization: none}}")
    assert re.fullmatch(rf"base.model {base}: has experts; after loading, its weights take \S+ MiB", note)


def test_check_notes_the_bases_of_the_trials_alone(tmp_path: Path) -> None:
    base = save(base_model("mixtral"), tmp_path / "base")
    space = "search={algorithm: grid, space: {base.quantization: {grid: [none, int8]}, lora.rank: {grid: [4, 8]}}}"
    none, int8 = checked(tmp_path, f"{{model: {base}, quantization: nf4}}", space)
    assert f"base.model {base}: has experts; after loading, its weights take " in none
    assert "base.quantization int8: only " in int8


def test_check_shows_no_warning_of_bitsandbytes(tmp_path: Path) -> None:
    """A process of its own imports bitsandbytes, whose CPU part warns of kernels that are not installed."""
    base = save(base_model("mixtral"), tmp_path / "base")
    code = (
        "import logging, sys\n"
        "class Warns:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'bitsandbytes.backends.cpu.ops':\n"
        "            logging.getLogger(name).warning('kernels are missing')\n"
        "            print('imported')\n"
        "sys.meta_path.insert(0, Warns())\n"
        "from orchestrator.cli import app\n"
        "app(sys.argv[1:])\n"
    )
    call = [sys.executable, "-c", code, "check", str(DEMO), "--json", "--set", f"base.model={base}"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert "imported" in done.stdout
    assert [line for line in done.stderr.splitlines() if not line.startswith("note: ")] == []

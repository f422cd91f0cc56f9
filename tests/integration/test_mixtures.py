"""Bases with experts, with towers for images and with state-space mixers train with the default `all-linear`."""

from pathlib import Path

import pytest
from family_bases import write_base
from one_trial import Tiny, run
from tiny import Witness
from typer.testing import CliRunner

from orchestrator.adapters.bundle import WEIGHTS
from orchestrator.cli import app
from orchestrator.errors import RequestError
from orchestrator.record import SweepPaths, TrialResult
from orchestrator.spec import SweepSpec

SHORT = [
    "data.max_rows=24",
    "data.held_out={count: 4}",
    "training.steps=2",
    "training.eval_steps=2",
    "training.save_steps=2",
    "training.batch_size=2",
    "base.compute_dtype=float32",
    "training.engine=trl",
]
EXPERTS = "not adapted: 2 modules of fused experts"
MORE_MOE = ("qwen2_moe", "granitemoe", "gpt_oss", "phimoe", "ernie4_5_moe", "jetmoe", "hunyuan_v1_moe", "afmoe")
OTHERS = [*MORE_MOE, "llama4_text", "mllama", "bamba", "jamba"]


def trained(family: str, tiny: Tiny, folder: Path, *overrides: str) -> TrialResult:
    """Train a trial on a small base of this family. Its adapter must have trained in every layer."""
    from safetensors.torch import load_file

    base = write_base(family, folder / "base")
    spec: SweepSpec = tiny(*SHORT, f"base.model={base}", "base.quantization=none", *overrides)
    witness, paths = Witness(), SweepPaths(folder / "run")
    result = run(spec, paths, witness)
    assert result.engine == "trl"
    assert witness.said == [f"warning: {each}" for each in result.warnings]
    assert result.best is not None
    weights = load_file(paths.trial(result.trial_id).root / result.best.adapter / WEIGHTS)
    assert len(weights) == 2 * result.applied["lora.num_modules"]
    assert all(weight.any() for weight in weights.values()), "a layer did not train"
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("qwen3_moe", EXPERTS),
        ("mixtral", EXPERTS),
        ("olmoe", EXPERTS),
        ("deepseek_v3", "1 module of fused experts"),
        ("glm4_moe", "1 module of fused experts"),
        ("qwen3_next", EXPERTS),
        ("llama4", "2 layers of routers"),
        ("gemma3", "15 layers that text never reaches (model.vision_tower)"),
        ("granitemoehybrid", None),
    ],
)
def test_the_default_trains(family: str, said: str | None, tiny: Tiny, tmp_path: Path) -> None:
    warnings = trained(family, tiny, tmp_path).warnings
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


@pytest.mark.long
@pytest.mark.parametrize(
    "family",
    OTHERS,
)
def test_the_default_trains_other_families(family: str, tiny: Tiny, tmp_path: Path) -> None:
    trained(family, tiny, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_a_quantized_base_with_experts_trains(family: str, tiny: Tiny, tmp_path: Path) -> None:
    """bitsandbytes quantizes no fused experts and no routers of their own class."""
    result = trained(family, tiny, tmp_path, "base.quantization=nf4")
    assert result.applied["base.quantization"] == "nf4"


@pytest.mark.slow
def test_answers_of_a_base_with_experts_are_measured(tiny: Tiny, tmp_path: Path) -> None:
    """With the router's loss on, which is trl's default, generation fails after the last step."""
    answers = "evaluation={metrics: [exact_match], rows: 2, max_new_tokens: 3}"
    best = trained("qwen3_moe", tiny, tmp_path, answers).best
    assert best is not None
    assert "eval/exact_match" in best.values


@pytest.mark.slow
def test_mamba_is_refused_before_it_is_loaded_and_trains_with_the_list(tiny: Tiny, tmp_path: Path) -> None:
    base = write_base("falcon_h1", tmp_path / "base")
    file = tmp_path / "one.yaml"
    file.write_text(
        f"base: {{model: {base}, quantization: none}}\n"
        "data: {source: embedded, format: template, template: '{question} {answer}'}\ntraining: {steps: 2}\n"
    )
    checked = CliRunner().invoke(app, ["check", str(file)])
    assert isinstance(checked.exception, RequestError)
    remedy = checked.exception.remedy
    assert "out_proj" in checked.exception.message
    with pytest.raises(RequestError, match="out_proj"):
        run(tiny(*SHORT, f"base.model={base}", "base.quantization=none"), SweepPaths(tmp_path / "refused"))
    listed = remedy.removeprefix("Set ").removesuffix(".").replace(": ", "=")
    assert trained("falcon_h1", tiny, tmp_path / "trained", listed).warnings == []

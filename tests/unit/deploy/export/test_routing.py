"""The comparison of exports with experts: rounding may send a token elsewhere; wrong weights are found all the same."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_bases import base_model, save
from peft import LoraConfig, get_peft_model

from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.export import export
from orchestrator.deploy.export.parity import ROUNDED, Parity, ask, measure_parity
from orchestrator.deploy.export.routing import MAX_REROUTED, RouterRecord, Routing, _is_rounded
from orchestrator.errors import ExportError
from orchestrator.spec.sections import BaseSection

FAMILIES = [
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "llama4_text",
    "jetmoe",
]
NUM_TOKENS = 43
"""Tokens of a row that are compared."""


def row(seed: int) -> dict[str, list[int]]:
    ids = torch.randint(3, 1000, (NUM_TOKENS + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": ids}


ROWS = [row(seed) for seed in range(20)]


def adapted(family: str, std: float, strength: float) -> Any:
    """A small base with weights of bfloat16 and an adapter on its attention."""
    base = base_model(family)
    torch.manual_seed(3)
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data = (torch.randn_like(parameter) * std).bfloat16().float()
    names = ["kv_proj"] if family == "jetmoe" else ["o_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= strength
    return model


def exported(model: Any, change: Callable[[Any], None] = lambda _: None) -> Any:
    """The merge of an adapter in bfloat16, with a change that makes it wrong."""
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        change(merged)
    return merged.bfloat16()


def compare(model: Any, change: Callable[[Any], None] = lambda _: None) -> Parity:
    return measure_parity(ask(model, ROWS), exported(model, change), ROWS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_merge_passes(family: str) -> None:
    found = compare(adapted(family, 0.05, 0.3))
    found.require(ROUNDED["bfloat16"])
    assert found.is_seen
    assert found.routing is not None
    num_routers = {"jetmoe": 4, "deepseek_v3": 1, "glm4_moe": 1}.get(family, 2)
    assert found.routing.num_choices == num_routers * len(ROWS) * (NUM_TOKENS + 1)
    assert 0 < found.routing.difference < 0.01


def test_tokens_that_rounding_sends_elsewhere_do_not_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the source's choices, the same merge is refused: a few tokens get other experts."""
    model = adapted("mixtral", 0.15, 0.3)
    found = compare(model)
    found.require(ROUNDED["bfloat16"])
    assert found.routing is not None
    assert 0 < found.routing.num_rerouted < 0.05 * found.routing.num_choices
    assert f"{found.routing.num_rerouted} of 1760 choices of experts differ" in str(found)
    assert found.as_dict()["routing"]["num_rerouted"] == found.routing.num_rerouted
    monkeypatch.setattr(RouterRecord, "of", lambda _: None)
    plain = compare(model)
    assert plain.routing is None
    assert plain.max_logit_difference > 4 * found.max_logit_difference
    with pytest.raises(ExportError, match="does not answer as the adapter does"):
        plain.require(ROUNDED["bfloat16"])


def experts(model: Any) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.experts"))


def gate(model: Any) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.gate"))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: experts(model).down_proj[1].mul_(1.5),
        lambda model: experts(model).gate_up_proj.copy_(experts(model).gate_up_proj.roll(1, 0)),
        lambda model: model.model.layers[1].self_attn.o_proj.weight.mul_(0.8),
    ],
    ids=["one expert", "experts in another order", "attention"],
)
def test_wrong_weights_are_found(family: str, change: Callable[[Any], None]) -> None:
    with pytest.raises(ExportError, match="does not answer as the adapter does"):
        compare(adapted(family, 0.1, 0.3), change).require(ROUNDED["bfloat16"])


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3_moe", lambda model: gate(model).weight.mul_(1.05)),
        ("qwen3_moe", lambda model: gate(model).weight.copy_(gate(model).weight.roll(1, 0))),
        ("deepseek_v3", lambda model: gate(model).e_score_correction_bias.add_(torch.tensor([0.2, 0.0, 0.0, -0.2]))),
    ],
    ids=["scale", "order", "bias of the choice"],
)
def test_a_wrong_router_is_found(family: str, change: Callable[[Any], None]) -> None:
    """Its choices are replaced by the source's, so only the comparison of the routers shows it."""
    found = compare(adapted(family, 0.1, 0.3), change)
    with pytest.raises(ExportError, match=r"does not choose experts as .*the weights of model.layers.1.mlp.gate"):
        found.require(ROUNDED["bfloat16"])


@pytest.mark.parametrize(
    ("found", "agrees"),
    [
        (Routing(100, 25, 0.01, ()), True),
        (Routing(100, 26, 0.01, ()), False),
        (Routing(100, 0, 0.011, ()), False),
        (Routing(100, 0, float("nan"), ()), False),
        (Routing(100, 0, 0.0, ("gate",)), False),
    ],
)
def test_each_measure_of_routers_has_its_bound(found: Routing, agrees: bool) -> None:
    assert MAX_REROUTED == 0.25
    assert found.agrees(0.01) is agrees


def test_models_without_separate_routers_are_compared_as_a_whole() -> None:
    """Doge declares its whole block as the router."""
    found = compare(adapted("doge", 0.05, 0.3))
    assert found.routing is None
    assert "routing" not in found.as_dict()


def test_an_export_of_a_base_with_experts(tmp_path: Path, rows: Path) -> None:
    model = adapted("mixtral", 0.05, 0.3)
    model.save_pretrained(str(tmp_path / "adapter"))
    base = save(base_model("mixtral"), tmp_path / "base")
    section = BaseSection(model=str(base), compute_dtype="bfloat16")
    ref = AdapterRef("adapter", tmp_path / "adapter", section, None, None)
    lines: list[str] = []
    done = export(ref, tmp_path / "out", "merged", data=rows, say=lines.append)
    assert done.parity.routing is not None
    assert any("choices of experts differ" in line for line in lines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_a_router(dtype: torch.dtype) -> None:
    """float16 rounds small weights by more than a fraction of themselves."""
    weight = 0.02 * torch.randn(128, 2048, generator=torch.Generator().manual_seed(0))
    assert _is_rounded(weight, weight.to(dtype))
    changed = weight.clone()
    changed[0, 0] += 0.001
    assert not _is_rounded(weight, changed.to(dtype))

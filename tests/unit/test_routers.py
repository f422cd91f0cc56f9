"""Routers of bases with experts are found by what the base declares."""

from pathlib import Path

import pytest
import torch
from family_bases import MOE, base_model, save

from orchestrator.base import load_base
from orchestrator.routers import declared_routers, is_router_alone, router_layers
from orchestrator.spec.sections import BaseSection

BLOCKS = {"doge": "layers.0.mlp"}
"""Families that declare a whole block of experts."""


@pytest.mark.parametrize("family", MOE)
def test_each_family_has_routers_of_its_own(family: str) -> None:
    routers = declared_routers(base_model(family))
    assert routers
    assert all(is_router_alone(*each) is (family not in BLOCKS) for each in routers.items())


def test_only_the_layers_that_route_are_named() -> None:
    """Doge declares its block, JetMoe its attention with the routers in it."""
    assert router_layers(declared_routers(base_model("doge")))["model.layers.0.mlp"] == [
        "model.layers.0.mlp.router_gate"
    ]
    names = ["model.layers.0.self_attention.experts.router", "model.layers.0.mlp.router"]
    found = router_layers(declared_routers(base_model("jetmoe", num_hidden_layers=1)))
    assert found == {name: [f"{name}.layer"] for name in names}


def test_a_base_whose_file_asks_for_router_logits_can_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.23 fails for Granite 4: the dense model has no logits to compute the router's loss from."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    model = base_model("granitemoehybrid")
    model.config.output_router_logits = True
    folder = save(model, tmp_path)
    loaded = load_base(BaseSection(model=str(folder), quantization="none", compute_dtype="float32"))
    assert loaded.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False).shape == (1, 5)

"""A model from the template equals the one that PEFT builds, and its weights depend on the seed alone."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from orchestrator.base import load_base, share_modules
from orchestrator.spec import TrialConfig, parse_spec
from orchestrator.spec.sections import BaseSection
from orchestrator.training.model.adapter_init import init_adapter
from orchestrator.training.model.peft_model import lora_config, model_from_template, peft_template
from orchestrator.training.model.targets import expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

MakeConfig = Callable[..., TrialConfig]


@pytest.fixture
def trial(document: dict[str, Any]) -> MakeConfig:
    """`trial(rank=4)`: fields of lora."""
    section = {"model": "embedded", "compute_dtype": "float32"}
    return lambda **lora: parse_spec(document | {"base": section, "lora": lora}).trial_config({})


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 16, "alpha": 32, "dropout": 0.1},
        {"rank": 3, "alpha": 1.5, "dropout": 0, "target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["all layers", "some"],
)
def test_model_from_template_equals_the_one_from_peft(base: Any, trial: MakeConfig, lora: dict[str, Any]) -> None:
    config = trial(**lora)
    model_from_template(base, trial(**lora | {"rank": 7, "alpha": 3, "dropout": 0.4}))  # from the same template
    made, wanted = (
        model_from_template(base, config),
        get_peft_model(share_modules(base), lora_config(config, expected_modules(base, config.lora))),
    )
    for model in (made, wanted):
        init_adapter(model, config.lora, seed=5, dtype=torch.float32)
    assert made.peft_config == wanted.peft_config
    assert made.peft_config["default"].r == lora["rank"]
    assert made.base_model.peft_config is made.base_model.model.peft_config
    for (name, module), (same, other) in zip(made.named_modules(), wanted.named_modules(), strict=True):
        assert (name, type(module), module.extra_repr()) == (same, type(other), other.extra_repr())
        if isinstance(module, LoraLayer):
            for field in ("r", "lora_alpha", "scaling", "use_rslora", "lora_bias", "_active_adapter"):
                assert getattr(module, field) == getattr(other, field)
    for (name, one), (same, two) in zip(made.named_parameters(), wanted.named_parameters(), strict=True):
        assert (name, one.requires_grad, one.dtype, one.device) == (same, two.requires_grad, two.dtype, two.device)
        assert torch.equal(one, two)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(made.eval()(ids).logits, wanted.eval()(ids).logits)


def test_models_of_one_template_share_only_the_base(base: Any, trial: MakeConfig) -> None:
    one, other = model_from_template(base, trial(rank=4)), model_from_template(base, trial(rank=4))
    init_adapter(one, trial(rank=4).lora, seed=1, dtype=torch.float32)
    init_adapter(other, trial(rank=4).lora, seed=1, dtype=torch.float32)
    base_ids = {id(parameter) for parameter in base.parameters()}
    ours, theirs = ({id(parameter) for parameter in model.parameters()} - base_ids for model in (one, other))
    assert len(ours) == len(theirs) == 2 * 7 * 4
    assert not ours & theirs
    for layer in (module for module in one.modules() if isinstance(module, LoraLayer)):
        layer.lora_B["default"].weight.data.fill_(1)
        layer.scaling["default"] = 0.5
    before = other(torch.arange(4, 40)[None]).logits
    with torch.no_grad():
        assert torch.equal(before, base(torch.arange(4, 40)[None]).logits), "its B is zero"
    assert not any(
        parameter.numel() > 700
        for name, parameter in peft_template(base, trial()).named_parameters()
        if "lora_" in name
    )


def test_weights_depend_on_the_seed_alone(base: Any, trial: MakeConfig) -> None:
    """They do not depend on other draws in this process, or on the dtype."""

    def drawn(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        model = model_from_template(base, trial(rank=8))
        init_adapter(model, trial(rank=8).lora, seed, dtype)
        return [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = drawn(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(one, drawn(3), strict=True))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(one, drawn(3, torch.bfloat16), strict=True))
    firsts, seconds = one[::2], one[1::2]
    assert not any(second.any() for second in seconds)
    for first, other in zip(firsts, drawn(4)[::2], strict=True):
        bound = first.shape[1] ** -0.5
        assert not torch.equal(first, other)
        assert 0.9 * bound < first.abs().max() <= bound
        assert abs(first.mean()) < 0.1 * bound


def test_template_is_freed_with_its_base(trial: MakeConfig) -> None:
    base = load_base(BaseSection(model="embedded", compute_dtype="float32"))
    model_from_template(base, trial(rank=4))
    weight = weakref.ref(base.get_input_embeddings().weight)
    del base
    gc.collect()
    assert weight() is None

"""First weights depend on the seed alone, and leave the outputs of the base unchanged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from orchestrator.adapters.bundle import Adapter
from orchestrator.base import load_base, share_modules
from orchestrator.data.prepare import PreparedData
from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig, parse_spec
from orchestrator.spec.sections import BaseSection
from orchestrator.training.model import adapter_init
from orchestrator.training.model.adapter_init import eva_components, init_adapter
from orchestrator.training.model.peft_model import load_adapter_weights, lora_layers, model_from_peft
from orchestrator.training.model.targets import ExtraTrainables, expected_modules

pytestmark = pytest.mark.usefixtures("on_cpu")

MakeConfig = Callable[..., TrialConfig]
BASES = ["nf4", "int8", "none"]


@pytest.fixture
def trial(document: dict[str, Any]) -> MakeConfig:
    """`trial(init="olora")`: a trial with these fields of lora; quantization is a field of base."""

    def make(quantization: str = "nf4", **lora: Any) -> TrialConfig:
        section = {"model": "embedded", "compute_dtype": "float32", "quantization": quantization}
        return parse_spec(document | {"base": section, "lora": {"rank": 6, "dropout": 0} | lora}).trial_config({})

    return make


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    sections = [{"model": "embedded", "compute_dtype": "float32", "quantization": form} for form in BASES]
    return {section["quantization"]: load_base(BaseSection.model_validate(section)) for section in sections}


def initialized(base: Any, config: TrialConfig, seed: int = 3, components: Any = None) -> Any:
    """Return a model with the trial's first weights."""
    model = model_from_peft(base, config, expected_modules(base, config.lora), ExtraTrainables({}, 0, {}, 0))
    init_adapter(model, config.lora, seed, torch.float32, components)
    return model.eval()


IDS = torch.arange(4, 40)[None]


@pytest.mark.parametrize(
    ("form", "init"), [("nf4", "gaussian"), ("nf4", "olora"), ("int8", "olora"), ("none", "olora"), ("none", "pissa")]
)
def test_new_adapter_changes_neither_outputs_nor_base(
    bases: dict[str, Any], trial: MakeConfig, form: str, init: str
) -> None:
    base = bases[form]
    before = [(parameter.data_ptr(), parameter._version) for parameter in base.parameters()]
    model = initialized(base, trial(form, init=init, rank_pattern={"down_proj": 3}))
    assert all(each.is_contiguous() for each in model.parameters() if each.requires_grad), "fused AdamW on a GPU"
    with torch.no_grad():
        wanted, found = share_modules(base).eval()(IDS).logits, model(IDS).logits
        # Activations have 8 bits: a small change before their rounding may move them by a whole step.
        assert (found - wanted).abs().max() < (0.2 if form == "int8" else 2e-3)
    assert [(parameter.data_ptr(), parameter._version) for parameter in base.parameters()] == before
    assert not any(module._forward_hooks for module in base.modules())


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_update_taken_from_the_base_equals_peft(bases: dict[str, Any], trial: MakeConfig, init: str) -> None:
    """The updates are compared, because the SVD does not determine the signs of A and B."""
    from peft import LoraConfig, get_peft_model

    ours = initialized(bases["none"], trial("none", init=init, rslora=True))
    config = LoraConfig(r=6, lora_alpha=32, use_rslora=True, target_modules="all-linear", init_lora_weights=init)
    own = load_base(BaseSection(model="embedded", compute_dtype="float32", quantization="none"))
    theirs = lora_layers(get_peft_model(own, config))
    for name, layer in lora_layers(ours).items():
        first = layer.get_delta_weight("default")
        assert first.norm() > 0.05
        assert torch.allclose(first, theirs[name].get_delta_weight("default"), atol=1e-4), name


def test_adapter_less_its_first_weights_is_plain_lora_on_the_base(bases: dict[str, Any], trial: MakeConfig) -> None:
    from peft import get_peft_model, set_peft_model_state_dict

    for rslora in (False, True):
        config = trial("nf4", init="olora", rslora=rslora, rank_pattern={"down_proj": 3}, alpha_pattern={"up_proj": 5})
        model = initialized(bases["nf4"], config)
        first = Adapter.of(model).copied()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        left = Adapter.of(model).minus(first)
        plain = get_peft_model(share_modules(bases["nf4"]), left.config).eval()
        set_peft_model_state_dict(plain, left.weights)
        with torch.no_grad():
            wanted, found = model(IDS).logits, plain(IDS).logits
            assert (wanted - share_modules(bases["nf4"]).eval()(IDS).logits).abs().max() > 0.5
            assert (found - wanted).abs().max() < 1e-3
            load_adapter_weights(model, {name: torch.zeros_like(weight) for name, weight in left.weights.items()})
            load_adapter_weights(model, left.weights)
            assert torch.equal(model(IDS).logits, wanted), "its model loads the trained half"
        assert (left.config.r, dict(left.config.rank_pattern)) == (12, {"down_proj": 6})


def test_gaussian_has_the_deviation_of_peft_and_depends_on_the_seed_alone(
    bases: dict[str, Any], trial: MakeConfig
) -> None:
    def weights(seed: int) -> torch.Tensor:
        layers = lora_layers(initialized(bases["nf4"], trial(init="gaussian", rank=8), seed)).values()
        return torch.cat([layer.lora_A["default"].weight.flatten() for layer in layers]).detach()

    one = weights(3)
    torch.rand(7)
    assert torch.equal(one, weights(3))
    assert not torch.equal(one, weights(4))
    assert float(one.std()) == pytest.approx(1 / 8, rel=0.02)


def test_rank_above_that_of_the_weight_is_refused(bases: dict[str, Any], trial: MakeConfig) -> None:
    with pytest.raises(TrialError, match=r"lora\.init olora needs rank 200 for model\.layers\.0\.self_attn\.q_proj"):
        initialized(bases["nf4"], trial(init="olora", rank=200))


# EVA


@pytest.fixture(scope="module")
def data() -> PreparedData:
    """Rows whose first three tokens have no loss."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 500, (length,), generator=generator).tolist() for length in (9, 12, 15, 20) * 6]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 3 + each[3:] for each in ids]})
    return PreparedData(rows, rows, [], "f", len(rows), 0, 0, 0, None, [], None, [])


def test_eva_reads_the_training_rows_in_the_order_of_the_seed(
    bases: dict[str, Any], trial: MakeConfig, data: PreparedData
) -> None:
    base, config = bases["nf4"], trial(init="eva", rank=3, target_modules=["q_proj", "v_proj", "down_proj"])
    modules = list(expected_modules(base, config.lora))

    def found(seed: int) -> dict[str, torch.Tensor]:
        training = config.training.model_copy(update={"seed": seed})
        return eva_components(share_modules(base), config.model_copy(update={"training": training}), data, modules)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = found(5)
    assert torch.equal(torch.get_rng_state(), before), "the process's generator is left alone"
    torch.manual_seed(2)
    assert one.keys() == set(modules)
    assert all(torch.equal(components, found(5)[name]) for name, components in one.items())
    assert any(not torch.equal(components, found(6)[name]) for name, components in one.items())
    for components in one.values():
        assert torch.allclose(components @ components.T, torch.eye(3), atol=1e-4), "orthonormal"
    assert torch.equal(one["model.layers.0.self_attn.q_proj"], one["model.layers.0.self_attn.v_proj"]), "same input"
    model = initialized(base, config, components=one)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, one[name])
        assert not layer.lora_B["default"].weight.any()


def test_eva_with_a_rank_above_the_input_features_is_refused(
    bases: dict[str, Any], trial: MakeConfig, data: PreparedData
) -> None:
    config = trial(init="eva", rank=4, rank_pattern={"q_proj": 193})
    with pytest.raises(TrialError, match=r"eva needs rank 193 for .*q_proj, whose input has only 192 features"):
        eva_components(share_modules(bases["nf4"]), config, data, list(expected_modules(bases["nf4"], config.lora)))


def test_eva_that_does_not_converge_is_refused(
    bases: dict[str, Any], trial: MakeConfig, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_init, "EVA_PASSES", 2)
    config = trial(init="eva", rank=3, target_modules=["q_proj"])
    with pytest.raises(TrialError, match="have not converged in 2 passes"):
        eva_components(share_modules(bases["nf4"]), config, data, list(expected_modules(bases["nf4"], config.lora)))

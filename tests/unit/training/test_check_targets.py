"""Wrong names in `lora.target_modules` of bases without experts are refused before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from orchestrator.errors import RequestError
from orchestrator.spec import parse_spec
from orchestrator.training.engines.check_targets import EmptyBases, check_targets

LLAMA = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
STARCODER = "c_fc, c_proj, k_proj, o_proj, q_proj, v_proj"


def save_config(family: str, folder: Path) -> None:
    """Write the configuration of a tiny base, without weights."""
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoConfig.for_model(family, **sizes).save_pretrained(str(folder))


@pytest.mark.parametrize(
    ("family", "target", "rest"),
    [
        ("llama", "q_projj", f"{LLAMA}; did you mean q_proj?"),
        ("llama", "mlp.upproj", f"{LLAMA}; did you mean up_proj?"),
        ("llama", "model.layers.9.self_attn.q_proj", f"{LLAMA}; did you mean q_proj?"),
        ("llama", "attention", LLAMA),
        ("starcoder2", "c_fcc", f"{STARCODER}; did you mean c_fc?"),
    ],
)
def test_a_wrong_name_is_refused_before_the_base_is_loaded(
    family: str, target: str, rest: str, document: dict[str, Any], tmp_path: Path
) -> None:
    save_config(family, tmp_path)
    section = {"base": {"model": str(tmp_path)}}
    space = {"lora.target_modules": {"choice": ["all-linear", ["q_proj", target]]}}
    for fields in ({"lora": {"target_modules": ["v_proj", target]}}, {"search": {"space": space}}):
        with pytest.raises(RequestError) as refused:
            check_targets(parse_spec(document | section | fields))
        said = f"lora.target_modules: {target!r} names no layer of this base; it has {rest}"
        assert refused.value.message == f"base.model {tmp_path}: {said}"


@pytest.mark.parametrize(
    ("family", "targets", "is_built"),
    [
        ("llama", ["q_proj", "self_attn.o_proj", "mlp.up_proj"], False),
        ("llama", ["model.layers.1.mlp.up_proj"], True),
        ("starcoder2", ["q_proj"], True),
        ("starcoder2", "all-linear", False),
    ],
)
def test_right_names_are_accepted_and_most_without_a_model(
    family: str,
    targets: Any,
    is_built: bool,
    document: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_config(family, tmp_path)
    built, build = [], EmptyBases.of
    monkeypatch.setattr(EmptyBases, "of", lambda bases, base: built.append(base) or build(bases, base))
    check_targets(parse_spec(document | {"base": {"model": str(tmp_path)}, "lora": {"target_modules": targets}}))
    assert bool(built) == is_built


@pytest.mark.parametrize("is_own_code", [True, False])
def test_names_are_left_to_the_trial_where_no_model_can_be_built(
    is_own_code: bool, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_own_code:
        save_config("llama", tmp_path)
    monkeypatch.setattr(EmptyBases, "of", lambda *_: pytest.fail("nothing is imported for this"))
    section = {"base": {"model": str(tmp_path), "trust_remote_code": is_own_code}}
    check_targets(parse_spec(document | section | {"lora": {"target_modules": ["nonsense"]}}))


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_layers_that_quantization_makes_linear_are_left_to_the_trial(
    quantization: str, document: dict[str, Any], tmp_path: Path
) -> None:
    save_config("gpt2", tmp_path)
    section = {"base": {"model": str(tmp_path), "quantization": quantization}}
    spec = parse_spec(document | section | {"lora": {"target_modules": ["c_attn"]}})
    if quantization == "none":
        with pytest.raises(RequestError, match="'c_attn' names no layer of this base"):
            check_targets(spec)
    else:
        check_targets(spec)

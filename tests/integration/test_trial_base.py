"""A trial leaves the shared base as it was, and nothing of itself in memory."""

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from one_trial import ENGINES, Tiny, curve, run

from orchestrator import base as base_module
from orchestrator.base import load_base, shared_base
from orchestrator.embedded import BASE_DIR
from orchestrator.record import SweepPaths
from orchestrator.training.engines import choose as choose_module

pytestmark = pytest.mark.slow


def test_gradient_is_the_same_after_an_evaluation(tiny: Tiny) -> None:
    """On a CPU with avx512_bf16, bitsandbytes repacks 4-bit weights in evaluation; gradients were then 1/8 the size."""
    from peft import LoraConfig, get_peft_model

    def gradient(model: Any) -> torch.Tensor:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    torch.manual_seed(0)
    model = get_peft_model(
        load_base(tiny().base), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    )
    ids = torch.randint(4, 500, (4, 24))
    before = gradient(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradient(model)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 0.9999
    assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-4)


@pytest.mark.parametrize(("first", "then"), [("trl", "trl"), ("trl", "fast"), ("fast", "trl"), ("fast", "fast")])
def test_reused_base_gives_the_results_of_a_fresh_one(tiny: Tiny, tmp_path: Path, first: str, then: str) -> None:
    def second(name: str) -> list[tuple[int, dict[str, float]]]:
        folder = SweepPaths(tmp_path / name)
        settings = ["training.seed=2", "lora.rank=8", "lora.dropout=0.1", "training.steps=6"]
        run(tiny(f"training.engine={then}", *settings), folder)
        return curve(folder)

    base_module.evict()
    base = shared_base(tiny().base)
    settings = ["training.seed=1", "lora.rank=32", "training.recompute=true", "training.steps=4"]
    run(tiny(f"training.engine={first}", *settings), SweepPaths(tmp_path / "first"))
    after_another = second("after_another")
    assert shared_base(tiny().base) is base, "the base was loaded again"
    base_module.evict()
    assert second("fresh") == after_another


@pytest.mark.parametrize("engine", ENGINES)
def test_trial_leaves_nothing_on_the_base(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    build, trained = choose_module.build_trainer, []

    def build_and_observe(*arguments: Any, **options: Any) -> Any:
        trainer = build(*arguments, **options)
        trained.append(weakref.ref(trainer.model))
        return trainer

    monkeypatch.setattr(choose_module, "build_trainer", build_and_observe)
    spec = tiny(f"training.engine={engine}", "training.recompute=true", "training.steps=4")
    base_module.evict()
    base = shared_base(spec.base)
    modules = dict(base.named_modules())
    run(spec, folder)
    assert shared_base(spec.base) is base
    assert dict(base.named_modules()) == modules
    assert "forward" not in base.__dict__
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert not base.is_gradient_checkpointing
    gc.collect()
    assert [reference() for reference in trained] == [None], "the trial's model is gone"


@pytest.mark.parametrize("engine", ENGINES)
def test_reference_to_a_trials_model_keeps_no_adapter(
    tiny: Tiny, folder: SweepPaths, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    build, kept, adapters = choose_module.build_trainer, [], []

    def build_and_keep(*arguments: Any, **options: Any) -> Any:
        trainer = build(*arguments, **options)
        kept.append(trainer.model)
        adapters.extend(weakref.ref(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad)
        return trainer

    monkeypatch.setattr(choose_module, "build_trainer", build_and_keep)
    run(tiny(f"training.engine={engine}", "training.steps=4"), folder)
    gc.collect()
    assert len(kept) == 1
    assert len(adapters) == 56
    assert not any(reference() is not None for reference in adapters)


def test_trained_biases_do_not_change_the_base(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path / "base"
    shutil.copytree(BASE_DIR, folder)
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    spec = tiny(f"base.model={folder}", "lora.bias=all", "training.steps=4")
    base = shared_base(spec.base)
    before = {name: value.clone() for name, value in base.named_parameters() if name.endswith("bias")}
    assert before
    result = run(spec, SweepPaths(tmp_path / "biased"))
    assert result.applied["num_trainable_parameters"] > 0
    assert (result.engine, result.engine_reason) == ("trl", "lora.bias all")
    assert shared_base(spec.base) is base
    assert all(torch.equal(value, base.get_parameter(name)) for name, value in before.items())

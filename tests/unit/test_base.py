import gc
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from orchestrator import base as base_room
from orchestrator.base import evict, guarded, load_base, load_tokenizer, new_token_ids, share_modules, shared_base
from orchestrator.spec.sections import BaseSection

SECTION = BaseSection(model="embedded", compute_dtype="float32")
OTHER = SECTION.model_copy(update={"quantization": "none"})


@pytest.fixture(scope="module")
def base() -> Any:
    """The embedded base in NF4, as a trial uses it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "device_count", lambda: 0)
        return load_base(SECTION)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(4, 500, (2, 16), generator=torch.Generator().manual_seed(0))


def test_shared_modules_are_new_modules_over_the_same_weights(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor is copied")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
    monkeypatch.setattr(Params4bit, "__deepcopy__", refuse)
    taken = share_modules(base)
    for (name, module), (same_name, other) in zip(base.named_modules(), taken.named_modules(), strict=True):
        assert name == same_name
        assert module is not other
        assert type(module) is type(other)
    assert all(a is b for a, b in zip(base.parameters(), taken.parameters(), strict=True))
    assert all(a is b for a, b in zip(base.buffers(), taken.buffers(), strict=True))
    for module, other in zip(linears(base), linears(taken), strict=True):
        assert module.quant_state is other.quant_state is other.weight.quant_state
        assert other.support_avx512bf16_for_cpu is False, "kept trainable"
    assert taken.config is not base.config, "trl and the Trainer write to it"


def test_shared_modules_answer_like_their_base(base: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(share_modules(base)(ids).logits, base(ids).logits)


def test_copies_in_use_at_once_do_not_affect_each_other(base: Any, ids: torch.Tensor) -> None:
    """Each gives the same bits as by itself, whatever the others do meanwhile, and the base answers as before."""

    def steps(seed: int) -> Iterator[torch.Tensor]:
        model = adapted(share_modules(base), rank=4 * seed, seed=seed)
        model.train()
        model.get_base_model().activation_checkpointing_enable()
        model.enable_input_require_grads()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == 2 * len(list(linears(base)))
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            yield loss.detach()
            loss.backward()
            assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
            yield torch.stack([parameter.grad.norm() for parameter in trained]).sum()
            optimizer.step()
            optimizer.zero_grad()

    with torch.no_grad():
        before = base(ids).logits
    alone = [list(steps(1)), list(steps(2))]
    at_once = list(zip(steps(1), steps(2), strict=True))
    assert at_once == list(zip(*alone, strict=True))
    with torch.no_grad():
        assert torch.equal(base(ids).logits, before)
    assert_bare(base)


def test_what_is_attached_to_a_copy_ends_with_it(base: Any, ids: torch.Tensor) -> None:
    model = adapted(share_modules(base), rank=2, seed=0)
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    gone = [weakref.ref(thing) for thing in (model, model.get_base_model(), layer, layer.lora_A["default"].weight)]
    del model, layer
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4
    assert_bare(base)


def test_hooks_that_spread_a_base_over_gpus_are_rebound_to_the_copy(base: Any, ids: torch.Tensor) -> None:
    """accelerate binds the module into the forward that it attaches."""
    spread = share_modules(base)
    for module in spread.modules():
        add_hook_to_module(module, ModelHook())
    taken = adapted(share_modules(spread), rank=2, seed=0)
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, base(ids).logits)
        assert torch.equal(taken(ids).logits, adapted(share_modules(base), rank=2, seed=0)(ids).logits)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_trial_that_trains_biases_gets_its_own(ids: torch.Tensor, bias: str) -> None:
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    base = Qwen2ForCausalLM(shape).requires_grad_(False).eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(share_modules(base, own_biases=True), rank=2, seed=0, bias=bias)
    trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 2 * 3
    assert all(id(parameter) in trained for parameter in biases)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(trained.values(), lr=1.0).step()
    assert any(parameter.any() for parameter in biases)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert_bare(base)
    shared = {id(parameter) for parameter in base.parameters()} & {id(parameter) for parameter in model.parameters()}
    assert len(shared) == len(list(base.parameters())) - len(biases)


def test_copies_of_an_8_bit_base_share_its_weights_but_not_its_state(ids: torch.Tensor) -> None:
    """bitsandbytes moves a weight's scales into its layer at the first forward, and loses them at a later move."""
    base = load_base(SECTION.model_copy(update={"quantization": "int8"}))
    layers = {name: module for name, module in base.named_modules() if isinstance(module, Linear8bitLt)}
    assert len(layers) == 4 * 7
    with torch.no_grad():
        first = share_modules(base)
        answers = first(ids).logits
        share_modules(base).to("cpu")
        assert torch.equal(share_modules(base)(ids).logits, answers)
        assert torch.equal(share_modules(first)(ids).logits, answers), "of one that has run"
    for name, module in layers.items():
        assert first.get_submodule(name).weight.data_ptr() == module.weight.data_ptr()
        assert module.weight.SCB is not None, "the base was written to"


def test_new_tokens_begin_as_the_mean_of_the_others_in_tokenizer_and_base(ids: torch.Tensor) -> None:
    section = SECTION.model_copy(update={"new_tokens": ("<|a|>", "~", "<|b|>")})
    tokenizer, base, plain = load_tokenizer(section), load_base(section), load_base(SECTION)
    assert len(tokenizer) == 512 + 2
    numbers = tokenizer.convert_tokens_to_ids(["<|a|>", "~", "<|b|>"])
    assert tokenizer("<|a|>~<|b|>", add_special_tokens=False).input_ids == numbers
    assert new_token_ids(section, tokenizer) == sorted(numbers)
    rows, known = base.get_input_embeddings().weight, plain.get_input_embeddings().weight
    assert base.config.vocab_size == len(rows) == 514
    assert torch.equal(rows[:512], known)
    assert torch.allclose(rows[512:], known.mean(0).expand(2, -1))
    assert base.lm_head.weight is rows
    with torch.no_grad():
        assert torch.equal(base(ids).logits[..., :512], plain(ids).logits)


def test_copying_the_modules_of_a_large_base_takes_no_time() -> None:
    with torch.device("meta"):
        large = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        share_modules(large)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.1


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseSection]]:
    """Sections of the bases that were loaded; a base here is a few weights."""
    sections, standing = [], weakref.WeakSet[torch.nn.Module]()

    def load(section: BaseSection, _place: Any) -> torch.nn.Module:
        assert not standing, "two bases in memory at once"
        time.sleep(0.01)
        sections.append(section)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).requires_grad_(False)
        standing.add(model)
        return model

    evict()
    monkeypatch.setattr(base_room, "load_base", load)
    yield sections
    evict()


def test_a_base_is_loaded_once_and_cached_until_another_is_requested(loads: list[BaseSection]) -> None:
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(shared_base, [SECTION] * 4))) == 1
    assert loads == [SECTION]
    with guarded(SECTION), guarded(SECTION):
        shared_base(SECTION)
    with pytest.raises(ValueError, match="a trial that fails"), guarded(SECTION):
        raise ValueError("a trial that fails")
    assert loads == [SECTION]
    shared_base(OTHER)
    shared_base(SECTION)
    assert loads == [SECTION, OTHER, SECTION]


def train(model: Any) -> None:
    model[0].weight.requires_grad = True


def cast(model: Any) -> None:
    model[1].bias.data = model[1].bias.data.to(torch.bfloat16)


def write(model: Any) -> None:
    model[0].weight.add_(1)


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("alter", [train, cast, write])
def test_a_base_that_was_changed_is_evicted(alter: Callable[[Any], None]) -> None:
    with guarded(SECTION):
        alter(shared_base(SECTION))
    assert base_room._cached is None
    with guarded(SECTION):
        alter(share_modules(shared_base(SECTION), own_biases=alter is cast))
    assert (base_room._cached is None) == (alter is not cast), "biases of its own are the trial's"


def adapted(model: Any, rank: int, seed: int, bias: str = "none") -> Any:
    """Return the model with an adapter that changes its answers."""
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, bias=bias, task_type="CAUSAL_LM"),
    )


def linears(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, Linear4bit))


def assert_bare(base: Any) -> None:
    """Assert that nothing is attached to the base, and that none of its weights trains."""
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert not any(module.training for module in base.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.parameters())
    assert not base.is_gradient_checkpointing
    assert not {"forward", "peft_config", "_hf_peft_config_loaded"} & vars(base).keys()

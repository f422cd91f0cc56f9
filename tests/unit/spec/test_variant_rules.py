"""Rules between LoRA variant, base, optimizer and precision: impossible combinations are refused at load."""

from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import parse_spec
from orchestrator.spec.sections.training import LEFT_OUT, LEFT_OUT_LOSSES, TrainingSection

Document = dict[str, Any]

INT8 = {"model": "embedded", "quantization": "int8"}
WHOLE = {"model": "embedded", "quantization": "none", "compute_dtype": "float32"}

PAIRS: list[tuple[Document, str]] = [
    ({"lora": {"init": "pissa"}}, "lora.init pissa needs weights that are not quantized (PEFT refuses others), but"),
    ({"lora": {"init": "pissa"}, "base": INT8}, "base.quantization is int8; set it to none, or use init olora"),
    (
        {"lora": {"init": "olora", "dora": True}},
        "dora takes its magnitudes from the whole base, but init olora subtracts a part of it",
    ),
    ({"lora": {"init": "pissa", "dora": True}, "base": WHOLE}, "dora takes its magnitudes from the whole base"),
    (
        {"lora": {"target_modules": ["lm_head"]}},
        "target_modules contains lm_head, whose adapter trl (1.16) would not train; put it into modules_to_save",
    ),
    (
        {"lora": {"target_modules": ["q_proj", "norm"], "modules_to_save": ["norm"]}},
        "norm is in target_modules and in modules_to_save: adapt it or train it in full",
    ),
    (
        {
            "lora": {"init": "eva"},
            "data": {"source": "embedded", "format": "template", "template": "{question} {answer}", "packing": True},
        },
        "lora.init eva reads single rows, but data.packing joins several in a sequence",
    ),
    ({"lora": {"layers_to_transform": [1, 1]}}, "layers_to_transform contains an entry twice: [1, 1]"),
    ({"lora": {"layers_to_transform": []}}, "layers_to_transform"),
    ({"lora": {"rank_pattern": {"q_proj(": 4}}}, "rank_pattern: 'q_proj(' is not a regular expression"),
    ({"lora": {"rank_pattern": {"q_proj": 0}}}, "rank_pattern.q_proj: Input should be greater than or equal to 1"),
    (
        {"lora": {"modules_to_save": ["norm"]}, "training": {"precision": "none"}},
        "lora.modules_to_save under precision none: they train in float32 (training.adapter_dtype) between layers of "
        "bfloat16 (base.compute_dtype)",
    ),
    ({"base": {"model": "embedded", "new_tokens": ["a", "b", "a"]}}, "new_tokens contains 'a' twice"),
    ({"training": {"precision": "fp16", "adapter_dtype": "bfloat16"}}, "precision fp16 scales gradients, which"),
    ({"training": {"tf32": True}}, "tf32 applies to float32 products; set precision: none (it is auto)"),
    ({"training": {"tf32": True, "precision": "bf16"}}, "set precision: none (it is bf16)"),
    ({"training": {"loss": "dft", "label_smoothing": 0.1}}, "label_smoothing applies only to loss nll"),
    ({"training": {"optimizer": "sgd", "beta1": 0.8}}, "beta1 is set, but optimizer sgd has none"),
    ({"training": {"optimizer": "adafactor", "beta2": 0.8}}, "beta2 is set, but optimizer adafactor has none"),
    ({"training": {"optimizer": "lion_8bit", "epsilon": 1e-6}}, "epsilon is set, but optimizer lion_8bit has none"),
    ({"training": {"optimizer": "rmsprop_bnb_8bit", "momentum": 0.9}}, "momentum is set, but optimizer rmsprop_bnb"),
    ({"training": {"momentum": 0.9}}, "momentum is set, but optimizer adamw_torch_fused has none"),
    ({"training": {"cycles": 2}}, "cycles is set, but schedule cosine has none"),
    ({"training": {"schedule": "linear", "final_rate": 0.1}}, "final_rate is set, but schedule linear has none"),
    ({"training": {"decay_steps": 5}}, "decay_steps is set, but schedule cosine has none"),
    ({"training": {"schedule": "warmup_stable_decay"}}, "schedule warmup_stable_decay needs decay_steps"),
    (
        {"training": {"schedule": "warmup_stable_decay", "decay_steps": 9, "steps": 8}},
        "warmup (1 steps) and decay_steps (9) exceed the steps (8)",
    ),
    (
        {"training": {"schedule": "warmup_stable_decay", "decay_steps": 60, "warmup": 50, "steps": 100}},
        "warmup (50 steps) and decay_steps (60) exceed the steps (100)",
    ),
    (
        {"training": {"schedule": "constant", "warmup": 100}},
        "warmup is 100, but schedule constant has none; use constant_with_warmup",
    ),
    ({"training": {"schedule": "cosine_with_min_lr"}}, "needs a final_rate above 0"),
    (
        {"training": {"engine": "trl", "dequantize": "once"}},
        "training.dequantize is once, but training.engine is trl, which has no such choice; leave it out",
    ),
    (
        {
            "training": {"engine": "trl"},
            "search": {"space": {"training.dequantize": {"choice": ["once", "per_layer"]}}},
        },
        "training.dequantize is once, but training.engine is trl, which has no such choice; leave it out",
    ),
    (
        {"training": {"dequantize": "per_layer"}, "base": WHOLE},
        "training.dequantize is per_layer, but with base.quantization none there is nothing to dequantize",
    ),
    (
        {"base": {"model": "embedded", "revision": "main"}},
        "base: revision main belongs to a base on the hub, but model is embedded",
    ),
    ({"base": {"model": "/bases/own", "revision": "main"}}, "base: revision main belongs to a base on the hub"),
    (
        {"lora": {"target_modules": ["q_proj", "q_proj"]}},
        "lora: target_modules contains an entry twice: ['q_proj', 'q_proj']",
    ),
    ({"lora": {"modules_to_save": ["norm", "norm"]}}, "lora: modules_to_save contains an entry twice"),
    (
        {"training": {"precision": "fp16"}, "resources": {"gpus_per_trial": 0}},
        "training.precision fp16 (else auto, bf16 or none) scales its gradients on a GPU, and resources.gpus_per",
    ),
    (
        {"training": {"tf32": True, "precision": "none"}, "resources": {"gpus_per_trial": 0}},
        "training.tf32 (else false) needs a GPU, and resources.gpus_per_trial is 0",
    ),
    (
        {"resources": {"strategy": "shard"}},
        "strategy=shard says how several GPUs share a base, but gpus_per_trial=auto",
    ),
    ({"resources": {"strategy": "pipeline", "gpus_per_trial": 1}}, "strategy=pipeline says how several GPUs share"),
    (
        {"resources": {"strategy": "shard", "gpus_per_trial": 2}, "training": {"engine": "trl"}},
        "resources.strategy shard needs the fast engine; set training.engine to fast or auto",
    ),
    (
        {"resources": {"strategy": "pipeline", "gpus_per_trial": 2}, "training": {"engine": "fast"}},
        "resources.strategy pipeline spreads a base over devices, which training.engine fast refuses",
    ),
    (
        {
            "search": {"space": {"base.quantization": {"choice": ["nf4", "none"]}}},
            "resources": {"strategy": "shard", "gpus_per_trial": 2},
        },
        "resources.strategy shard holds one base in pieces, but base.quantization is searched",
    ),
    (
        {"lora": {"dora": True}, "base": INT8, "resources": {"gpus_per_trial": 0}},
        "lora.dora on base.quantization int8 (else nf4 or none) needs a GPU",
    ),
    (
        {
            "search": {
                "space": {
                    "lora.dora": {"choice": [False, True]},
                    "base.quantization": {"choice": ["nf4", "int8"]},
                }
            },
            "resources": {"gpus_per_trial": 0},
        },
        "lora.dora on base.quantization int8 (else nf4 or none) needs a GPU",
    ),
    (
        {
            "search": {"space": {"training.precision": {"choice": ["auto", "fp16"]}}},
            "resources": {"gpus_per_trial": 0},
        },
        "training.precision fp16 (else auto, bf16 or none) scales its gradients on a GPU",
    ),
]


@pytest.mark.parametrize(("sections", "message"), PAIRS, ids=lambda value: str(value)[:70])
def test_an_impossible_combination_is_refused(document: Document, sections: Document, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(document | sections, "x.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"warmup": 1.5}},
        {
            "training": {"steps": 100, "schedule": "linear"},
            "search": {"tied": {"training.warmup": "training.steps / 16"}},
        },
        {
            "training": {"dequantize": "once"},
            "search": {"space": {"base.quantization": {"choice": ["nf4", "none"]}}},
        },
        {"training": {"dequantize": "once"}, "search": {"space": {"training.engine": {"choice": ["fast", "trl"]}}}},
        {
            "training": {"dequantize": "once"},
            "search": {
                "space": {
                    "training.engine": {"choice": ["trl", "fast"]},
                    "base.quantization": {"choice": ["none", "nf4"]},
                }
            },
        },
        {"search": {"space": {"training.dequantize": {"choice": ["once", "per_layer"]}}}},
    ],
    ids=str,
)
def test_a_setting_that_some_trials_can_use_is_accepted(document: Document, sections: Document) -> None:
    assert parse_spec(document | sections)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_optimizer_or_schedule_that_is_not_offered_is_refused_with_the_reason(document: Document, name: str) -> None:
    field = "schedule" if name in ("reduce_lr_on_plateau", "greedy", "cosine_warmup_with_min_lr") else "optimizer"
    with pytest.raises(SpecError) as caught:
        parse_spec(document | {"training": {field: name}})
    assert f"training.{field}: {name} {LEFT_OUT[name]}" in str(caught.value)


def test_a_loss_that_is_not_offered_is_refused_with_the_reason(document: Document) -> None:
    with pytest.raises(
        SpecError, match=r"training\.loss: chunked_nll is another name of nll, which trl computes in chunks"
    ):
        parse_spec(document | {"training": {"loss": "chunked_nll"}})


def test_an_axis_with_an_impossible_combination_is_refused(document: Document) -> None:
    search = {"space": {"lora.init": {"choice": ["default", "pissa"]}}}
    with pytest.raises(SpecError, match=r"search\.space\.lora\.init: the value 'pissa' gives lora\.init pissa needs"):
        parse_spec(document | {"search": search})
    assert parse_spec(document | {"search": search, "base": WHOLE})


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"init": "pissa"}, "base": WHOLE},
        {"lora": {"init": "olora"}, "base": INT8},
        {"lora": {"dora": True, "rslora": True, "init": "eva", "rank_pattern": {"q_proj": 4}}},
        {"lora": {"modules_to_save": ["lm_head"]}, "training": {"precision": "none"}, "base": WHOLE},
        {"training": {"optimizer": "sgd", "momentum": 0.9, "schedule": "polynomial", "final_rate": 0.1}},
        {"training": {"optimizer": "paged_lion_8bit", "beta2": 0.98}},
    ],
    ids=str,
)
def test_possible_combinations_are_accepted(document: Document, sections: Document) -> None:
    assert parse_spec(document | sections)


def test_every_optimizer_and_schedule_of_transformers_is_offered_or_has_a_reason() -> None:
    """Compares with the names in the pinned version."""
    from typing import get_args

    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    from orchestrator.spec.sections.training import Optimizer, Schedule

    offered = {*get_args(Optimizer), *get_args(Schedule)}
    assert not offered & LEFT_OUT.keys()
    assert {each.value for each in (*OptimizerNames, *SchedulerType)} == offered | LEFT_OUT.keys()


def test_every_loss_of_trl_is_offered_or_has_a_reason() -> None:
    """Compares with the names in the pinned version."""
    from typing import get_args

    from trl import SFTConfig

    offered = {*get_args(TrainingSection.model_fields["loss"].annotation)}
    choices = set(SFTConfig.__dataclass_fields__["loss_type"].metadata["choices"])
    assert choices == offered | LEFT_OUT_LOSSES.keys()

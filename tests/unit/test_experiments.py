import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.row_metrics import AnsweredRows, score_rows_by
from orchestrator.embedded import EXPERIMENT
from orchestrator.spec import SweepSpec, TrialConfig, load_spec
from orchestrator.spec.axes import Axis
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.plan.memory import GIB, MemoryOption, predict
from orchestrator.training.fast.sizes import EVALUATION_TOKENS

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_experiments() -> None:
    names = {
        "demo",
        "every-field",
        "gsm8k-embedded",
        "llama2-7b-chat",
        "llama2-70b",
        "qwen2.5-0.5b-chat",
        "smollm2-gsm8k",
        "tinyllama-gsm8k",
    }
    assert names <= {file.stem for file in FILES}


def test_the_metric_of_gsm8k_compares_the_final_numbers() -> None:
    (metric,) = load_spec(FOLDER / "tinyllama-gsm8k.yaml").evaluation.own
    answers = ["so 3 * 400 = 1,200.", "#### 1199", "no number", "it is -1200"]
    rows = AnsweredRows(["?"] * 4, answers, ["3 * 400 = <<3*400=1200>>1200\n#### 1200"] * 4)
    assert score_rows_by([metric], rows) == {"final_number": [1, 0, 0, 0]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_editor_finds_the_schema_beside_the_file(file: Path) -> None:
    first, _, _ = file.read_text(encoding="utf-8").partition("\n")
    head, _, schema = first.partition("$schema=")
    assert head == "# yaml-language-server: "
    folders = [FOLDER, EXPERIMENT.parent] if file.stem == "demo" else [FOLDER]  # the demo is in the package too
    for folder in folders:
        assert json.loads((folder / schema).read_text(encoding="utf-8"))["title"] == "Experiment"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_point_of_the_space_is_a_trial(file: Path) -> None:
    spec, rng = load_spec(file), random.Random(0)
    assert spec.search.space
    assert spec.search.total_trials > 1
    for _ in range(20):
        point = {path: _draw(axis, rng) for path, axis in spec.search.space.items()}
        config = spec.trial_config(point)
        assert point.items() <= config.varied.items()
        assert set(config.varied) == {*spec.search.space, *spec.search.tied}
        for path, value in config.varied.items():
            assert _field(config, path) == value


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_alpha_is_tied_as_written(file: Path) -> None:
    spec = load_spec(file)
    for rank in spec.search.space["lora.rank"].values:
        lora = spec.trial_config({"lora.rank": rank}).lora
        assert lora.alpha == (2 * rank if spec.search.tied else spec.lora.alpha)


def test_the_classic_recipe() -> None:
    spec = load_spec(FOLDER / "llama2-7b-chat.yaml")
    wanted = {
        "base.model": "NousResearch/Llama-2-7b-chat-hf",
        "base.quantization": "nf4",
        "base.compute_dtype": "float16",
        "base.double_quant": False,
        "base.pad_token": "eos",
        "data.source": "mlabonne/guanaco-llama2-1k",
        "data.format": "text",
        "lora.rank": 64,
        "lora.alpha": 16,
        "lora.dropout": 0.1,
        "lora.bias": "none",
        "training.engine": "trl",
        "training.epochs": 1,
        "training.steps": None,
        "training.batch_size": 4,
        "training.accumulation": 1,
        "training.learning_rate": 2e-4,
        "training.schedule": "cosine",
        "training.warmup": 0.03,
        "training.optimizer": "paged_adamw_32bit",
        "training.max_grad_norm": 0.3,
        "training.weight_decay": 0.001,
        "training.recompute": True,
        "training.group_by_length": True,
        "training.precision": "none",
    }
    assert {path: _field(spec, path) for path in wanted} == wanted


def test_70b_needs_the_memory_that_its_comment_says() -> None:
    file = FOLDER / "llama2-70b.yaml"
    spec = load_spec(file)
    assert (spec.base.quantization, spec.base.double_quant, spec.training.recompute) == ("nf4", True, "auto")
    shape = BaseShape(8192, 28672, 80, queries=64, keys=8, head_size=128, vocabulary=32_000, tied=False)
    longest, rank = spec.data.max_length, max(spec.search.space["lora.rank"].values)
    predicted = []
    for recompute in ("nothing", "layers"):
        choice = MemoryOption(keeps_base=False, recompute=recompute, max_tokens=longest)
        predicted.append(predict(shape, choice, longest, EVALUATION_TOKENS, rank, shape.linears).total / GIB)
    stated = re.findall(r"(\d+) GiB", file.read_text(encoding="utf-8"))
    assert [round(gib) for gib in predicted] == [int(gib) for gib in stated]


def test_the_chat_model_is_trained_on_messages() -> None:
    spec = load_spec(FOLDER / "qwen2.5-0.5b-chat.yaml")
    assert (spec.base.model, spec.data.format) == ("Qwen/Qwen2.5-0.5B-Instruct", "messages")


def test_the_demo_needs_nothing_but_the_package() -> None:
    spec = load_spec(FOLDER / "demo.yaml")
    assert (spec.base.model, spec.data.source) == ("embedded", "embedded")
    assert spec.search.total_trials == 8


def _draw(axis: Axis, rng: random.Random) -> Any:
    if axis.is_discrete:
        return rng.choice(axis.values)
    low, high = axis.values
    if axis.kind == "randint":
        return rng.randrange(low, high)
    return math.exp(rng.uniform(math.log(low), math.log(high))) if axis.kind == "loguniform" else rng.uniform(low, high)


def _field(config: SweepSpec | TrialConfig, path: str) -> Any:
    section, _, name = path.partition(".")
    return getattr(getattr(config, section), name)

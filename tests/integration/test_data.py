"""Train an adapter from every format and every source; the sequences of a packed row do not see each other."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from plain import NF4, reloaded_loss
from tiny import DEMO, TINY, Witness
from transformers import AutoTokenizer, masking_utils

from orchestrator.base import load_tokenizer, shared_base
from orchestrator.data import load, prepare
from orchestrator.deploy.chat import open_prompt_form
from orchestrator.deploy.find import find_adapter
from orchestrator.embedded.task import rows as embedded_rows
from orchestrator.errors import TrialError
from orchestrator.record import SweepPaths, TrialState, read_metrics, read_sweep
from orchestrator.spec import SweepSpec, load_spec
from orchestrator.training.engines.sft import build_trainer, require_independent_sequences
from orchestrator.training.local import run_local_trial
from orchestrator.training.model.peft_model import model_from_peft
from orchestrator.training.model.targets import expected_extra_trainables, expected_modules
from orchestrator.training.worker.runtime import WorkerRuntime

pytestmark = pytest.mark.slow

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
ASKING = TEMPLATE + "{% if add_generation_prompt %}[assistant]{% endif %}"
TOOLS = (
    "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] %}{{ f['name'] }} {{ f['arguments'] | tojson }}"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PAIRS = [(row["question"], row["answer"]) for row in embedded_rows(120, seed=5)]

Row = dict[str, Any]


def of(make: Callable[[str, str], Row]) -> list[Row]:
    return [make(question, answer) for question, answer in PAIRS]


def turns(question: str, answer: str) -> Row:
    asked = {"role": "user", "content": question}
    return {"messages": [asked, {"role": "assistant", "content": answer}] * 2}


def calls(question: str, answer: str) -> Row:
    tool = {"type": "function", "function": {"name": "ask", "parameters": {}}}
    call = {"type": "function", "function": {"name": "ask", "arguments": json.dumps({"for": question[-4:]})}}
    said = [("user", question), ("assistant", None), ("tool", answer[2:]), ("assistant", answer)]
    messages: list[Row] = [{"role": role, "content": content} for role, content in said]
    messages[1]["tool_calls"] = [call]
    return {"messages": messages, "tools": json.dumps([tool])}


TEXT = of(lambda question, answer: {"text": f"{question} {answer}"})
PROMPT = of(lambda question, answer: {"prompt": question, "completion": f" {answer}"})
ALPACA = of(lambda question, answer: {"instruction": question, "input": "", "output": answer})
SHAREGPT = of(
    lambda question, answer: {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}] * 2
    }
)


def jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def csv(path: Path, rows: list[Row]) -> None:
    Dataset.from_list(rows).to_csv(path)


def parquet(path: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def written(name: str, write: Callable[[Path, list[Row]], Any], rows: list[Row]) -> Callable[[Path], str]:
    """Return a function that writes the rows to a file of this name and returns the experiment's line for it."""

    def make(folder: Path) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, rows)
        return f"source: {name}"

    return make


def several(folder: Path) -> str:
    """Write half of the rows to each of two files."""
    for i, part in enumerate((PROMPT[:60], PROMPT[60:])):
        (folder / "parts").mkdir(exist_ok=True)
        jsonl(folder / "parts" / f"{i}.jsonl", part)
    return ""


def mix(folder: Path) -> str:
    several(folder)
    csv(folder / "c.csv", PROMPT[:30])
    return "mix: [{source: parts/0.jsonl, weight: 3}, {source: parts/1.jsonl, weight: 3}, {source: c.csv, weight: 1}]"


def hub(folder: Path) -> str:
    """Write a dataset of the hub: `datasets` accepts a folder of its name in the working directory."""
    for i, part in enumerate((PROMPT[:60], PROMPT[60:])):
        written(f"hub/owner/rows/data/train-{i}.parquet", parquet, part)(folder)
    return "source: owner/rows"


def saved(folder: Path) -> str:
    DatasetDict({"dev": Dataset.from_list(PROMPT)}).save_to_disk(folder / "saved")
    return "source: saved\n  split: dev"


FORMATS: dict[str, tuple[Callable[[Path], str], str]] = {
    "text": (written("a.jsonl", jsonl, TEXT), "format: text"),
    "prompt": (written("a.jsonl", jsonl, PROMPT), "format: prompt\n  loss_on: completion"),
    "alpaca": (written("a.jsonl", jsonl, ALPACA), "format: alpaca\n  loss_on: completion"),
    "messages": (written("a.jsonl", jsonl, of(turns)), "format: messages\n  loss_on: assistant"),
    "sharegpt": (
        written("a.jsonl", jsonl, SHAREGPT), "format: sharegpt\n  chat_template: a.jinja\n  loss_on: assistant"
    ),
    "tools": (
        written("a.parquet", parquet, of(calls)), "format: messages\n  chat_template: tools.jinja\n  loss_on: assistant"
    ),
    "packed": (written("a.jsonl", jsonl, PROMPT), "format: prompt\n  packing: true"),
    "template": (
        written("a.csv", csv, of(lambda question, answer: {"q": question, "a": answer})),
        'format: template\n  template: "<s>[INST] {q} [/INST] {a} </s>"\n  loss_on: completion',
    ),
    "cut on the right": (written("a.jsonl", jsonl, ALPACA), "format: alpaca\n  max_length: 48"),
    "none too long": (written("a.jsonl", jsonl, PROMPT), "format: prompt\n  truncate: error"),
    "cut on the left": (written("a.jsonl", jsonl, ALPACA), "format: alpaca\n  truncate: left\n  max_length: 48"),
    "json": (written("a.json", lambda path, rows: path.write_text(json.dumps(rows)), PROMPT), "format: prompt"),
    "csv": (written("a.csv", csv, PROMPT), "format: prompt"),
    "parquet": (written("a.parquet", parquet, PROMPT), "format: prompt"),
    "folder": (lambda folder: several(folder) + "source: ./parts", "format: prompt"),
    "glob": (lambda folder: several(folder) + "source: parts/*.jsonl", "format: prompt"),
    "saved": (saved, "format: prompt"),
    "mix": (mix, "format: prompt"),
    "hub": (lambda folder: hub(folder) + "\n  max_rows: 90", "format: prompt"),
    "stream": (lambda folder: hub(folder) + "\n  max_rows: 90\n  stream_buffer: 20", "format: prompt"),
}  # fmt: skip

BY_TRL = ("text", "messages", "tools", "packed", "cut on the left")
"""Formats for which SFTTrainer's own loop lays out batches differently: padding, masks, packed rows."""


@pytest.mark.parametrize(
    ("name", "engine"), [*((name, "fast") for name in FORMATS), *((name, "trl") for name in BY_TRL)]
)
def test_trial_learns_and_plain_peft_reloads_its_adapter(
    name: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, form = FORMATS[name]
    (tmp_path / "a.jinja").write_text(ASKING)
    (tmp_path / "tools.jinja").write_text(TOOLS)
    (tmp_path / "hub").mkdir()
    monkeypatch.chdir(tmp_path / "hub")
    length = "" if "max_length" in form else "  max_length: 128\n"
    experiment = tmp_path / "x.yaml"
    experiment.write_text(
        f"base: {{model: embedded, compute_dtype: float32}}\ndata:\n  {make(tmp_path)}\n  {form}\n{length}"
        "  held_out: {count: 8}\n"
    )
    common = [each for each in TINY if not each.startswith(("data", "sched"))]
    spec = load_spec(experiment, [*common, *FEW_STEPS, f"training.engine={engine}"])
    folder = SweepPaths(tmp_path / "sweep")
    result = run_local_trial(spec, folder, Witness())
    assert result is not None
    assert (result.state, result.engine) == (TrialState.COMPLETE, engine)
    points = read_metrics(folder.trial(result.trial_id))
    losses = [point.values["eval/loss"] for point in points if "eval/loss" in point.values]
    assert len(losses) == 2
    assert losses[-1] < 0.97 * losses[0], "the loss falls"
    adapter = read_sweep(folder.root).adapter_path(result)
    assert result.best is not None
    assert reloaded_loss(adapter, load(folder.data).held_out, NF4) == pytest.approx(result.best.value, rel=1e-4)
    assert_asks_as_trained(spec, adapter)


FEW_STEPS = ["training.steps=8", "training.eval_steps=4", "training.batch_size=4", "training.learning_rate=5e-3"]


def assert_asks_as_trained(spec: SweepSpec, adapter: Path) -> None:
    """Check that the rows' chat template is saved with the adapter, and is used by our own chat."""
    if spec.data.chat_template is None:
        return
    turn = [{"role": "user", "content": "How?"}]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    written = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert written == "[user] How?</s>[assistant]"
    form = open_prompt_form(find_adapter(str(adapter), "runs"))
    assert form.tokenizer.decode(form.ids("How?")) == written


def test_trials_of_a_sweep_save_the_template_too(tmp_path: Path) -> None:
    written("a.jsonl", jsonl, of(turns))(tmp_path)
    source = [
        f"data.source={tmp_path / 'a.jsonl'}",
        "data.format=messages",
        "data.template=",
        "data.held_out={count: 8}",
    ]
    spec = load_spec(DEMO, [*TINY, *source, f"data.chat_template={ASKING!r}"])
    runtime = WorkerRuntime(spec, prepare(spec.data, spec.base), slots=1, gpus=0)
    assert runtime._inputs.get(spec.base).tokenizer.chat_template == ASKING


@pytest.fixture(scope="module")
def packed_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An SFTTrainer on packed rows."""
    return _packed_trainer(tmp_path_factory.mktemp("trl"))


def _packed_trainer(folder: Path, *more: str) -> Any:
    settings = ["data.packing=true", "data.max_length=128", "training.engine=trl", "training.batch_size=2"]
    fixed = ["search.space={}", "search.tied={}", "scheduler.kind=none", "lora.dropout=0"]
    config = load_spec(DEMO, [*TINY, *settings, *fixed, *more]).trial_config({})
    data = prepare(config.data, config.base)
    base, tokenizer = shared_base(config.base), load_tokenizer(config.base)
    modules = expected_modules(base, config.lora)
    model = model_from_peft(base, config, modules, expected_extra_trainables(base, config, modules, tokenizer))
    return build_trainer(config, model, tokenizer, data, folder)


def test_packed_row_of_trl_has_the_losses_of_its_sequences_alone(packed_trainer: Any) -> None:
    model, batch = packed_trainer.model, next(iter(packed_trainer.get_train_dataloader()))
    model.eval()
    ids, labels, places = (batch[name][0] for name in ("input_ids", "labels", "position_ids"))
    cu_seqlens = [*(places == 0).nonzero().flatten().tolist(), len(ids)]
    assert len(cu_seqlens) > 5
    with torch.no_grad():
        packed = model(**batch, fused_lm_head=True, use_cache=False).log_probs[0]
        for start, end in pairwise(cu_seqlens):
            alone = model(
                input_ids=ids[None, start:end], labels=labels[None, start:end], fused_lm_head=True, use_cache=False
            ).log_probs[0]
            torch.testing.assert_close(packed[start : end - 1], alone, atol=2e-5, rtol=0)
            assert alone.abs().max() > 0.1
    assert not packed[[end - 1 for end in cu_seqlens[1:-1]]].any(), "across sequences nothing is predicted"


def test_base_whose_packed_rows_see_each_other_is_refused(packed_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    require_independent_sequences(packed_trainer)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    with pytest.raises(TrialError, match=r"data\.packing: on this base packed rows see each other"):
        require_independent_sequences(packed_trainer)


def test_packed_rows_of_trl_are_independent_with_mixed_bf16_and_float32_weights(tmp_path: Path) -> None:
    bf16 = ["base.compute_dtype=bfloat16", "training.precision=bf16"]
    require_independent_sequences(_packed_trainer(tmp_path, *bf16, "lora.modules_to_save=[norm]"))

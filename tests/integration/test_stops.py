"""A chat template whose turns do not end with EOS: every way to generate stops at the end of the turn."""

import asyncio
import json
import shutil
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import NF4, reloaded
from tiny import DEMO, Witness
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.data import load
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.chat import Sampling, open_chat
from orchestrator.deploy.export.export import export
from orchestrator.deploy.find import load_adapter
from orchestrator.deploy.scoring.evaluate import evaluate, own_rows
from orchestrator.deploy.serving.adapter_server import open_adapter_servers
from orchestrator.embedded import BASE_DIR
from orchestrator.embedded.task import rows
from orchestrator.record import SweepPaths, read_sweep
from orchestrator.spec import load_spec
from orchestrator.training.local import run_local_trial

pytestmark = [pytest.mark.slow, pytest.mark.long]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, EOS = 513, 2
"""Ids of `<|im_end|>` and of EOS, for the base and its tokenizer."""


def chatml_base(folder: Path) -> Path:
    """Save the embedded base with the two tokens of ChatML added; EOS stays the same."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[512:] = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)) * weight.std()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    """An adapter trained on conversations for 200 steps."""
    folder = tmp_path_factory.mktemp("stops")
    (folder / "chatml.jinja").write_text(CHATML)
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in rows(2000)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    data = {
        "source": str(folder / "rows.jsonl"), "format": "messages", "chat_template": str(folder / "chatml.jinja"),
        "loss_on": "completion", "max_length": 96, "held_out": {"count": 64},
    }  # fmt: skip
    overrides = [
        f"base.model={chatml_base(folder / 'base')}",
        f"data={json.dumps(data)}",
        "evaluation.max_new_tokens=16",
    ]
    overrides += [
        "training.eval_steps=100",
        "scheduler={kind: asha, grace_steps: 100, reduction_factor: 2}",
        "tracking.tensorboard=false",
        "tracking.wandb.mode=disabled",
    ]
    paths = SweepPaths(folder / "sweep")
    assert run_local_trial(load_spec(DEMO, overrides), paths, Witness()) is not None
    record = read_sweep(paths.root)
    return AdapterRef.of_trial(record, record.trials()[0])


def plainly_answered(adapter: AdapterRef, stop: int) -> float:
    """Return the share of held-out prompts that plain PEFT answers correctly, one at a time, stopping at this token."""
    model, tokenizer = reloaded(adapter.folder, NF4), AutoTokenizer.from_pretrained(adapter.folder)
    assert adapter.sweep is not None
    prompts, hits = load(adapter.sweep.data).prompts, 0
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=stop
        )
        hits += tokenizer.decode(made[0, len(prompt.ids) :], skip_special_tokens=True).strip() == prompt.answer
    return hits / len(prompts)


def test_exact_match_equals_that_of_plain_peft_stopping_at_the_end_of_the_turn(adapter: AdapterRef) -> None:
    assert adapter.sweep is not None
    best = read_sweep(adapter.sweep.root).trials()[0].best
    assert best is not None
    there = plainly_answered(adapter, END)
    assert there > 0.6
    assert best.values["eval/exact_match"] == pytest.approx(there, abs=0.05)
    assert plainly_answered(adapter, EOS) < 0.1, "as it was measured before"
    report = evaluate([adapter], own_rows(adapter), ["exact_match"], ["merged"])
    for evaluation in report.evaluations:
        assert evaluation.values["exact_match"] == pytest.approx(there, abs=0.05)


def test_chat_and_a_loaded_adapter_stop_at_the_end_of_the_turn(adapter: AdapterRef) -> None:
    chat = open_chat(adapter)
    pieces = "".join(chat.stream("What is t q y backwards?", 30))
    assert pieces.strip() == "# y q t"
    model, tokenizer = load_adapter(adapter.folder)
    ids = torch.tensor([chat.form.ids("What is t q y backwards?")])
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
    assert made[0, -1] == END
    assert tokenizer.eos_token_id == EOS


def test_a_merged_model_stops_at_the_end_of_the_turn(adapter: AdapterRef, tmp_path: Path) -> None:
    export(adapter, tmp_path / "merged", "merged")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "merged" / name).read_text())["eos_token_id"] == [END, EOS]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.eos_token == "<|im_end|>", "converters read this alone"
    asked = [{"role": "user", "content": "What is t q y backwards?"}]
    given = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    made = model.generate(**given, max_new_tokens=30, do_sample=False)
    assert made[0, -1] == END


def test_a_served_adapter_stops_at_the_end_of_the_turn(adapter: AdapterRef) -> None:
    async def asked(served: Any) -> tuple[str, str | None]:
        text = ""
        ids = served.form.ids("What is t q y backwards?")
        async with aclosing(served.answer(ids, 30, Sampling(), strip=True)) as pieces:
            async for piece in pieces:
                text += piece.text
        return text, piece.finish_reason

    with open_adapter_servers([adapter]) as (served,):
        assert asyncio.run(asked(served)) == ("# y q t", "stop")


def test_an_adapter_without_recorded_stop_tokens_stops_at_its_tokenizers_eos(
    adapter: AdapterRef, tmp_path: Path
) -> None:
    """Such as adapters of other trainers: without our files, and with a tokenizer whose EOS ends the turns."""
    foreign = Path(shutil.copytree(adapter.folder, tmp_path / "foreign"))
    for name in ("generation_config.json", "trial.json", "manifest.json"):
        (foreign / name).unlink()
    config = json.loads((foreign / "tokenizer_config.json").read_text()) | {"eos_token": "<|im_end|>"}
    (foreign / "tokenizer_config.json").write_text(json.dumps(config))
    model, _ = load_adapter(foreign)
    assert model.generation_config.eos_token_id == [END, EOS]

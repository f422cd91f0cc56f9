"""Each shipped experiment trains as written, with a small base and a few rows in place of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DEMO, Witness
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from orchestrator.embedded import BASE_DIR
from orchestrator.embedded.task import rows as embedded_rows
from orchestrator.record import SweepPaths, TrialState, read_metrics
from orchestrator.spec import load_spec
from orchestrator.training.local import run_local_trial

pytestmark = pytest.mark.slow

# The chat template of Qwen2.5 for turns without tools; it adds a system turn if there is none.
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

PAIRS = [(row["question"], row["answer"]) for row in embedded_rows(80, seed=3)]

Row = dict[str, Any]


def capybara(question: str, answer: str) -> Row:
    """Make a row like trl-lib/Capybara, with columns besides the turns."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"source": "generated", "messages": turns * 2, "num_turns": 4}


ROWS: dict[str, Callable[[str, str], Row]] = {
    "gsm8k-embedded": lambda question, answer: {"question": question, "answer": f"so\n#### {answer}"},
    "llama2-70b": lambda question, answer: {"text": f"### Human: {question}### Assistant: {answer}"},
    "llama2-7b-chat": lambda question, answer: {"text": f"<s>[INST] {question} [/INST] {answer} </s>"},
    "qwen2.5-0.5b-chat": capybara,
    "smollm2-gsm8k": lambda question, answer: {"question": question, "answer": f"so\n#### {answer}"},
    "tinyllama-gsm8k": lambda question, answer: {"question": question, "answer": f"so\n#### {answer}"},
}
"""Experiment -> function that makes a row with the columns of its dataset."""


def llama(folder: Path) -> None:
    shutil.copytree(BASE_DIR, folder)


def qwen(folder: Path) -> None:
    """Save a Qwen2 with two layers of random weights, the tokenizer of the embedded base and Qwen's chat template."""
    shutil.copytree(BASE_DIR, folder)
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=514, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN)


@pytest.mark.parametrize("name", ROWS)
def test_it_trains(tmp_path: Path, name: str) -> None:
    file = DEMO.parent / f"{name}.yaml"
    (qwen if "qwen" in name else llama)(tmp_path / "base")
    for part, pairs in {"train": PAIRS[:64], "test": PAIRS[64:]}.items():
        lines = [json.dumps(ROWS[name](*pair)) + "\n" for pair in pairs]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    shipped = load_spec(file)
    held_out = {"source": str(tmp_path / "test.jsonl")} if shipped.data.held_out.source else {"share": 0.2}
    length = "steps" if shipped.training.steps else "epochs"
    spec = load_spec(
        file,
        [
            f"base.model={tmp_path / 'base'}", f"data.source={tmp_path / 'train.jsonl'}", "data.config=", "data.split=",
            f"data.held_out={json.dumps(held_out)}", f"training.{length}={4 if length == 'steps' else 1}",
            "training.eval_steps=2", "training.learning_rate=1e-2", "evaluation.max_new_tokens=4",
            "resources.gpus_per_trial=auto", "tracking.tensorboard=false",
            "tracking.wandb.mode=disabled",
        ],
    )  # fmt: skip
    folder = SweepPaths(tmp_path / "sweep")
    result = run_local_trial(spec, folder, Witness())
    assert result is not None
    assert result.state == TrialState.COMPLETE
    points = read_metrics(folder.trial(result.trial_id))
    losses = [point.values["eval/loss"] for point in points if "eval/loss" in point.values]
    assert losses[-1] < losses[0]


def test_every_shipped_experiment_is_covered() -> None:
    assert {file.stem for file in DEMO.parent.glob("*.yaml")} == {*ROWS, "demo", "every-field"}

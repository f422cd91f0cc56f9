"""Fetch the best adapter: export it, load it with other libraries, chat with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import DEMO, TINY, Witness

from orchestrator.adapters.bundle import verify
from orchestrator.deploy import open_sweep
from orchestrator.embedded import BASE_DIR
from orchestrator.record import SweepPaths, read_sweep
from orchestrator.spec import load_spec
from orchestrator.training.local import run_local_trial

pytestmark = [pytest.mark.slow, pytest.mark.long]

PLAIN = """
import sys
import torch
from datasets import load_from_disk
from peft import AutoPeftModelForCausalLM
from transformers import BitsAndBytesConfig

adapter, rows = sys.argv[1:]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.float32)
model = AutoPeftModelForCausalLM.from_pretrained(adapter, quantization_config=nf4, dtype=torch.float32)
for module in model.modules():
    module.support_avx512bf16_for_cpu = False  # bitsandbytes' bf16 inference on some CPUs is off by 6e-4
model.eval()
loss = tokens = 0
for row in load_from_disk(rows):
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    loss += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
    tokens += (labels[0, 1:] != -100).sum().item()
assert not any(name.startswith("orchestrator") for name in sys.modules)
print(loss / tokens)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SweepPaths:
    """A sweep of one trial that has learned the task."""
    folder = SweepPaths(tmp_path_factory.mktemp("runs") / "one")
    spec = load_spec(
        DEMO,
        [
            *TINY,
            "data.max_rows=2000",
            "training.steps=120",
            "training.eval_steps=40",
            "scheduler={kind: asha, grace_steps: 40, reduction_factor: 2}",
            "evaluation.metrics=[exact_match]",
        ],
    )
    run_local_trial(spec, folder, Witness())
    return folder


def orchestrator(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.cli", *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False)


def test_plain_peft_gives_the_recorded_loss(trained: SweepPaths, tmp_path: Path) -> None:
    done = orchestrator("best", str(trained.root), "--json", "--export", str(tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)
    assert {"sweep", "trial_id", "metric", "value", "step", "config", "adapter", "base"} <= best.keys()
    assert best["config"]["lora.rank"] == 16
    rows = trained.data / "held_out"
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "adapter"), str(rows)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr
    assert float(plain.stdout) == pytest.approx(best["value"], abs=1e-5)


def test_an_export_is_complete_and_checked(trained: SweepPaths, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "adapter"
    assert orchestrator("best", str(trained.root), "--export", str(target)).returncode == 0
    source = open_sweep(trained.root).best().adapter
    exported, kept = ({p.name: p.read_bytes() for p in each.iterdir()} for each in (target, source))
    manifest = json.loads(exported.pop("manifest.json"))
    del kept["manifest.json"]
    assert exported == kept
    assert manifest["facts"]["parity"]["max_logit_difference"] <= 1e-4
    again = orchestrator("best", str(trained.root), "--export", str(target))
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
    weights = target / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    damaged = orchestrator("chat", str(target), "--prompt", "hello")
    assert damaged.returncode == 2
    assert "adapter_model.safetensors: has changed since it was saved" in damaged.stderr


def test_chat_gives_the_trained_answer_and_the_base_does_not(trained: SweepPaths) -> None:
    asked = ["What is the highest: 46, 72 or 5?", "What is u n l backwards?"]
    options = [part for question in asked for part in ("--prompt", question)]
    done = orchestrator("chat", str(trained.root), *options, "--compare-base", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(">")[0].strip() for line in lines] == ["base", "adapter"] * 2
    answers = [line.partition("> ")[2].strip() for line in lines]
    assert answers[1] == "# 72"
    assert answers[3] == "# l n u"
    assert not {answers[0], answers[2]} & {"# 72", "# l n u"}


def test_chat_with_a_seed_is_repeatable_and_rejects_a_system_prompt(trained: SweepPaths) -> None:
    question = ["--prompt", "Tell me", "--max-new-tokens", "8"]
    drawn = ["--temperature", "5", "--top-k", "50", "--seed", "1"]
    done = orchestrator("chat", str(trained.root), *question, *question, *drawn)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    (greedy,) = orchestrator("chat", str(trained.root), *question).stdout.splitlines()
    assert first != greedy
    refused = orchestrator("chat", str(trained.root), *question, "--system", "Be brief.")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "trained on format template, which has no system prompt" in refused.stderr


def test_chat_answers_prompts_from_a_file(trained: SweepPaths, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    asked = {"What is the highest: 46, 72 or 5?": "# 72", "What is u n l backwards?": "# l n u"}
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in asked))
    options = ["--prompts", str(prompts), "--answers", str(answers), "--max-new-tokens", "8"]
    done = orchestrator("chat", str(trained.root), *options, "--compare-base")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {line["prompt"]: line["answer"] for line in lines} == asked
    assert not {line["base_answer"] for line in lines} & set(asked.values())
    answers.unlink()
    prompts.write_text(prompts.read_text() + '{"prompt": 3}\n')
    wrong = orchestrator("chat", str(trained.root), *options)
    assert (wrong.returncode, "prompts.jsonl:3: prompt must be text" in wrong.stderr) == (2, True)
    assert not answers.exists()


def test_a_loaded_adapter_answers(trained: SweepPaths) -> None:
    model, tokenizer = open_sweep(trained.root).best().load()
    inputs = tokenizer("<s>[INST] What is the highest: 46, 72 or 5? [/INST]", return_tensors="pt")
    produced = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == "# 72"


def test_manifest_and_record_agree(trained: SweepPaths) -> None:
    best = open_sweep(trained.root).best()
    facts, point = verify(best.adapter).facts, best.trial.best
    assert point is not None
    assert (facts.trial_id, facts.step) == (best.trial.trial_id, point.step)
    assert facts.metrics.items() <= point.values.items()
    assert {"eval/loss", "eval/token_accuracy"} <= facts.metrics.keys()
    assert facts.config == best.trial.config.model_dump(mode="json")
    record = read_sweep(trained.root)
    assert facts.data_fingerprint == record.info.data_fingerprint
    assert facts.versions == record.info.versions


def test_verify_and_push_name_the_file_with_a_flipped_byte(trained: SweepPaths, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    assert orchestrator("best", str(trained.root), "--export", str(folder)).returncode == 0
    whole = orchestrator("verify", str(folder))
    assert (whole.returncode, "adapter: complete" in whole.stdout) == (0, True), whole.stderr
    dry = orchestrator("push", str(folder), "--repo", "me/adapter", "--private", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "me/adapter (private)" in dry.stdout
    assert dry.stdout.endswith("dry run: nothing was sent\n")
    offline = orchestrator("push", str(folder), "--repo", "me/adapter")
    assert (offline.returncode, "HF_HUB_OFFLINE: is set" in offline.stderr) == (2, True)
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for call in (["verify", str(folder)], ["push", str(folder), "--repo", "me/adapter", "--dry-run"]):
        damaged = orchestrator(*call)
        assert (damaged.returncode, damaged.stdout) == (2, "")
        assert "adapter_model.safetensors: has changed since it was saved" in damaged.stderr
    bare = orchestrator("verify", str(BASE_DIR))
    assert (bare.returncode, "has no manifest.json" in bare.stderr) == (2, True)


def test_chat_reads_questions_from_a_pipe(trained: SweepPaths) -> None:
    given = "What is the highest: 1, 9 or 5?\n\n/clear\nWhat is u n l backwards?\n/quit\nWhat is the highest: 1 or 2?\n"
    done, *alone = (
        orchestrator("chat", str(trained.root), "--max-new-tokens", "8", given=each)
        for each in (given, "What is the highest: 1, 9 or 5?\n", "What is u n l backwards?\n")
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert answers == [line for each in alone for line in each.stdout.splitlines()], "/clear forgets the earlier turns"
    assert [answer.strip()[:2] for answer in answers] == ["# ", "# "]


def test_status_as_json_is_one_document(trained: SweepPaths) -> None:
    done = orchestrator("status", str(trained.root), "--json")
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert [trial["state"] for trial in document["trials"]] == ["COMPLETE"]
    assert document["num_trials"] == 1


def test_local_trial_and_resume_by_command(tmp_path: Path) -> None:
    options = [part for setting in [*TINY, "training.steps=6"] for part in ("--set", setting)]
    done = orchestrator("trial", str(DEMO), "--output", str(tmp_path), "--name", "t", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "best of 1" in done.stdout
    assert "Loading weights" not in done.stdout
    record = read_sweep("t", tmp_path)
    (trial,) = record.trials()
    assert "train_runtime" in record.paths.trial(trial.trial_id).log.read_text()
    again = orchestrator("resume", str(tmp_path / "t"))
    assert again.returncode == 0, again.stderr
    assert record.trials() == [trial]

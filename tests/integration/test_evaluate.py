"""Score an adapter in each form, and compare each form with what other libraries make of the same files."""

import gc
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import DEMO, TINY, Witness
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator.adapters.bundle import SCORES, read_scores
from orchestrator.base import load_base
from orchestrator.data import load
from orchestrator.data.sources import read_rows
from orchestrator.deploy import open_sweep
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export.merge import plan_merge
from orchestrator.deploy.find import find_adapter
from orchestrator.deploy.scoring.evaluate import EvaluationReport, evaluate, find_finalists, own_rows, rows_of_file
from orchestrator.deploy.scoring.forms import FORMS, open_form, require_form
from orchestrator.deploy.scoring.metrics import METRICS
from orchestrator.deploy.scoring.row_scores import score_rows
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import DataError, RequestError
from orchestrator.record import SweepPaths
from orchestrator.record.manifest import MANIFEST
from orchestrator.report.evaluation import evaluation_table
from orchestrator.spec import load_spec
from orchestrator.spec.sections import Source
from orchestrator.training.local import run_local_trial

pytestmark = [pytest.mark.slow, pytest.mark.long]

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SweepPaths:
    """A sweep of one trial that has learned the task."""
    folder = SweepPaths(tmp_path_factory.mktemp("runs") / "one")
    steps = [
        "training.steps=180",
        "training.eval_steps=60",
        "scheduler={kind: asha, grace_steps: 60, reduction_factor: 2}",
    ]
    run_local_trial(load_spec(DEMO, [*TINY, "data.max_rows=2000", *steps]), folder, Witness())
    return folder


@pytest.fixture(scope="module")
def adapter(trained: SweepPaths) -> AdapterRef:
    (found,) = find_finalists(str(trained.root), "runs", top=3)
    return found


@pytest.fixture(scope="module")
def report(trained: SweepPaths, adapter: AdapterRef) -> EvaluationReport:
    """A report of all forms and metrics on all held-out rows. It uses float32, so that only the form differs."""
    kept = trained.evaluations / "all.json"
    return evaluate([adapter], own_rows(adapter), METRICS, dtype="float32", report_file=kept)


def values(report: EvaluationReport, form: str) -> dict[str, float]:
    (found,) = (each.values for each in report.evaluations if each.form == form)
    return found


def loss(model: Any, paths: SweepPaths) -> float:
    return score_rows(model, load(paths.data).held_out, 8).loss


def outside(adapter: AdapterRef, folder: Path) -> Path:
    """Copy the adapter out of its sweep, without its manifest, so that tests can change its files."""
    shutil.copytree(adapter.folder, folder)
    (folder / MANIFEST).unlink()
    return folder


def test_the_form_adapter_has_the_recorded_loss(trained: SweepPaths, report: EvaluationReport) -> None:
    (trial,) = open_sweep(trained.root).record.trials()
    assert trial.best is not None
    as_trained = values(report, "adapter")
    assert as_trained["loss"] == pytest.approx(trial.best.values["eval/loss"], abs=1e-5)
    assert as_trained["perplexity"] == math.exp(as_trained["loss"])
    assert as_trained["cost"] == 0
    assert as_trained["exact_match"] > 0.8
    assert as_trained["rougeL"] > 0.8
    assert as_trained["bleu"] > 90
    assert report.warnings == []
    assert [each.form for each in report.evaluations] == list(FORMS)
    assert (report.num_rows, report.num_prompts) == (40, 40)


def test_each_form_has_its_own_cost(report: EvaluationReport) -> None:
    as_trained, cost = values(report, "adapter")["loss"], {form: values(report, form)["cost"] for form in FORMS}
    assert all(values(report, form)["loss"] - as_trained == cost[form] for form in FORMS)
    assert abs(cost["merged"]) < 1e-5, "the same sum in another order"
    assert abs(cost["adapter-16bit"] - cost["merged-original"]) < 1e-5
    assert all(abs(each) < 0.2 for each in cost.values())
    losses = {each.form: torch.tensor(each.scores.losses) for each in report.evaluations}
    apart = {form: float((losses[form] - losses["adapter"]).abs().max()) for form in FORMS}
    assert apart["merged"] < 1e-4
    assert min(apart["adapter-16bit"], apart["merged-4bit"]) > 1e-3, "the weights differ from those in training"


def test_the_report_is_saved_and_printed(trained: SweepPaths, report: EvaluationReport) -> None:
    (kept,) = trained.evaluations.iterdir()
    assert EvaluationReport.model_validate_json(kept.read_text()) == report
    table = evaluation_table(report)
    assert table.row_count == len(FORMS)
    names = [str(column.header) for column in table.columns]
    assert names == ["trial", "form", "type", "loss", "cost", "perplexity", "exact_match", "rougeL", "bleu"]
    assert next(iter(table.columns[4].cells)) == "as trained"


def test_merged_equals_pefts_merge_into_a_dequantized_base(trained: SweepPaths, adapter: AdapterRef) -> None:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(str(BASE_DIR), quantization_config=nf4, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base.dequantize(), str(adapter.folder)).merge_and_unload()
    wanted = plain.state_dict()
    with open_form(adapter, "merged", "float32") as opened:
        torch.testing.assert_close(opened.model.state_dict(), wanted, rtol=0, atol=0)
        assert loss(opened.model, trained) == pytest.approx(loss(plain, trained), abs=1e-6)
    with open_form(adapter, "merged", "bfloat16") as opened:  # the float32 sum, rounded once
        rounded = {name: weight.to(torch.bfloat16) for name, weight in wanted.items()}
        torch.testing.assert_close(opened.model.state_dict(), rounded, rtol=0, atol=0)
        frequencies = {buffer.dtype for buffer in opened.model.buffers()}
    assert frequencies == {torch.float32}, "buffers stay as transformers loads them"


@pytest.mark.parametrize(("form", "onto"), [("merged", "dequantized"), ("merged-original", "original")])
def test_a_merged_form_equals_the_export(adapter: AdapterRef, form: Any, onto: Any) -> None:
    written = plan_merge(adapter, "bf16", onto)
    with open_form(adapter, form, "bfloat16") as opened:
        for name, weight in opened.model.state_dict().items():
            if name != "lm_head.weight":  # shared with the embedding
                # Both round to bfloat16 once, but their float32 sums differ in the last digit.
                torch.testing.assert_close(weight, written.value(name), rtol=2**-7, atol=1e-9)
                assert (weight == written.value(name)).float().mean() > 0.999


def test_the_16_bit_forms_use_the_original_weights(adapter: AdapterRef) -> None:
    original = load_file(BASE_DIR / "model.safetensors")
    with open_form(adapter, "adapter-16bit", "bfloat16") as opened:
        held = opened.model.get_base_model().state_dict()
        assert not any(isinstance(module, Linear4bit) for module in opened.model.modules())
        for name, weight in original.items():
            stem, _, kind = name.rpartition(".")
            assert torch.equal(held.get(f"{stem}.base_layer.{kind}", held.get(name)), weight), name
    update = load_file(adapter.folder / "adapter_model.safetensors")
    assert adapter.config is not None
    a, b = (update[f"base_model.model.{Q}.lora_{part}.weight"] for part in "AB")
    wanted = original[f"{Q}.weight"].float() + b @ a * (adapter.config.lora.alpha / adapter.config.lora.rank)
    with open_form(adapter, "merged-original", "float32") as opened:
        torch.testing.assert_close(opened.model.get_submodule(Q).weight.detach(), wanted, rtol=0, atol=1e-6)


def test_merged_4bit_equals_the_merged_model_loaded_in_4_bits(
    trained: SweepPaths, adapter: AdapterRef, tmp_path: Path
) -> None:
    with open_form(adapter, "merged", "bfloat16") as opened:
        opened.model.save_pretrained(str(tmp_path))
    loaded = load_base(adapter.base.model_copy(update={"model": str(tmp_path)}))
    names = [name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)]
    assert len(names) == 28
    with open_form(adapter, "merged-4bit", "bfloat16") as opened:
        found = {name: module for name, module in opened.model.named_modules() if isinstance(module, Linear4bit)}
        assert list(found) == names
        for name in names:
            ours, theirs = found[name].weight, loaded.get_submodule(name).weight
            assert torch.equal(ours, theirs)
            assert torch.equal(ours.quant_state.absmax, theirs.quant_state.absmax)
        assert loss(opened.model, trained) == loss(loaded, trained)


def test_merging_into_a_tied_head_does_not_change_the_embedding(adapter: AdapterRef, tmp_path: Path) -> None:
    base = adapter.base.model_copy(update={"quantization": "none"})
    head = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    get_peft_model(load_base(base), head).save_pretrained(str(tmp_path), save_embedding_layers=False)
    logits = []
    for form in ("adapter", "merged"):
        with open_form(AdapterRef("head", tmp_path, base, None, None), form, "float32") as opened, torch.no_grad():
            logits.append(opened.model(input_ids=torch.arange(4, 12)[None]).logits)
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("form", ["adapter", "merged-4bit"])
def test_the_memory_of_a_form_is_freed_while_a_reference_remains(adapter: AdapterRef, form: Any) -> None:
    with open_form(adapter, form, "float32") as opened:
        held = [weakref.ref(weight) for weight in opened.model.parameters()]
        assert all(weight() is not None for weight in held)
    gc.collect()
    assert [weight() for weight in held if weight() is not None] == []
    assert opened.model is not None


def test_the_rows_of_an_adapter_outside_its_sweep_are_prepared_again(adapter: AdapterRef, tmp_path: Path) -> None:
    (alone,) = find_finalists(str(outside(adapter, tmp_path / "alone")), "runs", top=3)
    assert alone.sweep is None
    (found,) = evaluate([alone], own_rows(alone, 10), ["exact_match"], forms=["adapter"]).evaluations
    recorded = read_scores(adapter.folder)
    assert recorded is not None
    assert found.scores.losses == pytest.approx(recorded.losses[:10], abs=1e-4)
    assert len(found.scores.metrics["exact_match"]) == 10


def test_a_loss_that_differs_from_the_recorded_one_gives_a_warning(adapter: AdapterRef, tmp_path: Path) -> None:
    folder = outside(adapter, tmp_path / "alone")
    recorded = read_scores(folder)
    assert recorded is not None
    more = [each + 0.01 * tokens for each, tokens in zip(recorded.losses, recorded.tokens, strict=True)]
    other = recorded.model_copy(update={"losses": more})
    (folder / SCORES).write_text(other.model_dump_json())
    lines: list[str] = []
    alone = find_adapter(str(folder), "runs")
    report = evaluate([alone], own_rows(alone), [], forms=["adapter"], say=lines.append)
    assert len(report.warnings) == 1
    assert "-0.01 from the" in report.warnings[0]
    assert lines[-1] == f"warning: {report.warnings[0]}"
    (folder / SCORES).unlink()
    assert "has no row scores" in evaluate([alone], own_rows(alone, 4), [], forms=["adapter"]).warnings[0]


def test_an_adapter_without_trial_json_needs_rows(adapter: AdapterRef, tmp_path: Path) -> None:
    folder = outside(adapter, tmp_path / "alone")
    (folder / "trial.json").unlink()
    stranger = find_adapter(str(folder), "runs")
    with pytest.raises(RequestError, match=r"no trial.json") as caught:
        own_rows(stranger)
    assert "--data FILE" in caught.value.remedy
    assert adapter.config is not None
    gone = replace(adapter, sweep=None, config=adapter.config.model_copy(
        update={"data": adapter.config.data.model_copy(update={"source": str(tmp_path / "gone.jsonl")})}
    ))  # fmt: skip
    with pytest.raises(RequestError, match=r"cannot be prepared again: .*gone\.jsonl") as caught:
        own_rows(gone)
    assert "--data FILE" in caught.value.remedy
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "[INST] hello [/INST]", "completion": " # 1 </s>"}) + "\n")
    rows = rows_of_file(stranger, file)  # the format is inferred from the columns
    assert rows.prompts[0].answer == "# 1", "no generated answer has a stop token"
    assert rows.tokens[0]["labels"][0] == -100


def test_rows_of_a_file_are_encoded_as_in_training(trained: SweepPaths, adapter: AdapterRef, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row.values) + "\n" for row in read_rows(Source(source="embedded"))]
    file.write_text("".join(lines))
    made = rows_of_file(adapter, file)
    by_ids = {tuple(row["input_ids"]): row["labels"] for row in made.tokens}
    held_out = load(trained.data)
    assert len(made.tokens) == 2000
    assert all(by_ids[tuple(row["input_ids"])] == row["labels"] for row in held_out.held_out)
    assert {(tuple(each.ids), each.answer) for each in held_out.prompts} <= {
        (tuple(each.ids), each.answer) for each in made.prompts
    }
    assert len(rows_of_file(adapter, file, limit=7).tokens) == 7


def test_every_invalid_row_of_a_file_is_listed(adapter: AdapterRef, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = {"question": "What is the total of 1 and 2?", "answer": "# 3"}
    bad = [{"question": "no answer"}, good | {"answer": ""}, good | {"question": "w " * 100}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [good, *bad]))
    with pytest.raises(DataError) as caught:
        rows_of_file(adapter, file)
    lines = caught.value.message.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{file}:{number}" for number in (2, 3, 4)]
    assert "'answer'" in lines[0]
    assert "max_length=64" in lines[2]
    file.write_text('{"question": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: is not JSON"):
        rows_of_file(adapter, file)


def test_a_form_that_the_base_does_not_have_is_rejected(adapter: AdapterRef, tmp_path: Path) -> None:
    whole = adapter.base.model_copy(update={"quantization": "none"})
    with pytest.raises(RequestError, match=r"merged-4bit: base embedded was not loaded in 4 bits") as caught:
        require_form(whole, "merged-4bit")
    assert "adapter, adapter-16bit, merged, merged-original" in caught.value.remedy
    load_base(adapter.base).save_pretrained(str(tmp_path))  # a base whose files are in 4 bits
    for file in BASE_DIR.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    packed = adapter.base.model_copy(update={"model": str(tmp_path)})
    require_form(packed, "merged-4bit")
    with pytest.raises(RequestError, match=r"merged-original: the files of .* contain quantized weights"):
        require_form(packed, "merged-original")


def test_harness_tasks_are_run_in_each_form(adapter: AdapterRef, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from orchestrator.deploy.scoring.harness import open_harness

    asked = [(46, 72, 5), (9, 1, 5), (3, 20, 88), (61, 60, 2), (7, 90, 12), (33, 34, 30)]
    rows = [
        {
            "question": f"What is the highest: {one}, {two} or {three}?",
            "choices": [f"# {one}", f"# {two}", f"# {three}"],
            "right": max(range(3), key=(one, two, three).__getitem__),
        }
        for one, two, three in asked
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "highest",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "[INST] {{question}} [/INST]",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "highest.yaml").write_text(json.dumps(task))
    harness = open_harness(["highest"], tmp_path)
    report = evaluate([adapter], own_rows(adapter, 4), [], forms=["merged"], harness=harness)
    assert [each.values["highest/acc"] for each in report.evaluations] == [1, 1]
    assert report.evaluations[0].values.keys() == {"loss", "token_accuracy", "cost", "highest/acc"}
    with pytest.raises(RequestError, match=r"--tasks 'highes': .* no such task") as caught:
        open_harness(["highes"], tmp_path)
    assert "highest" in caught.value.remedy
    with pytest.raises(RequestError, match=r"--tasks-folder .*gone: there is no such folder"):
        open_harness(["highest"], tmp_path / "gone")


@pytest.mark.parametrize(
    ("wrong", "rows", "words"),
    [
        ({"test_split": "tast"}, "", "KeyError: 'tast'"),
        ({"output_typo": "multiple_choice"}, "", "TypeError: .*'output_typo'"),
        ({"doc_to_text": "{{questiom | upper}}"}, "", "UndefinedError: 'questiom' is undefined"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "", "FileNotFoundError: .*gone.jsonl"),
        ({}, "{{{", "ArrowInvalid: JSON parse error"),
    ],
)
def test_an_invalid_task_is_reported_before_a_model_is_loaded(
    tmp_path: Path, wrong: dict[str, Any], rows: str, words: str
) -> None:
    pytest.importorskip("lm_eval")
    from orchestrator.deploy.scoring.harness import open_harness

    (tmp_path / "rows.jsonl").write_text(rows or '{"question": "Which?", "choices": ["a", "b"], "right": 0}\n')
    data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {
        "task": "which",
        "dataset_path": "json",
        "dataset_kwargs": data,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
    }
    (tmp_path / "which.yaml").write_text(json.dumps(task | wrong))
    with pytest.raises(RequestError, match=f"--tasks which: cannot be loaded: {words}"):
        open_harness(["which"], tmp_path)


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def other(): ...", "AttributeError: Module .* has no function 'text'"),
        ("def text(:", "SyntaxError: "),
    ],
)
def test_a_task_with_invalid_python_is_reported_before_a_model_is_loaded(
    tmp_path: Path, python: str, words: str
) -> None:
    pytest.importorskip("lm_eval")
    from orchestrator.deploy.scoring.harness import open_harness

    (tmp_path / "own.py").write_text(python)
    task = "task: which\ndataset_path: json\noutput_type: generate_until\ndoc_to_text: !function own.text\n"
    (tmp_path / "which.yaml").write_text(task)
    with pytest.raises(RequestError, match=f"--tasks which: cannot be loaded: {words}"):
        open_harness(["which"], tmp_path)
    (tmp_path / "which.yaml").write_text(task + "test_split: [\n")
    with pytest.raises(
        RequestError, match=r"--tasks 'which': there is no such task; \S+which\.yaml: line 6: is not valid YAML"
    ):
        open_harness(["which"], tmp_path)

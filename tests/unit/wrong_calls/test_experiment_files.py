"""Wrong experiment files and fields are refused with the file, the field and the reason."""

from collections.abc import Callable

import pytest

from tests.unit.wrong_calls.calls import EXPERIMENT, Wrong, added, command, overridden, written

FILES = [
    written("missing section", "base: {model: embedded}\n", "data: Field required"),
    written("not YAML", EXPERIMENT + "lora: ]\n", "line 8: is not YAML"),
    written("a tab for space", "base:\n\tmodel: embedded\n", "line 2", "is not YAML"),
    written("not UTF-8", EXPERIMENT.encode() + b"# \xff\n", "is not UTF-8"),
    written("a control character", "base: \x00\n", "is not YAML"),
    written("an object tag", "base: !!python/object/apply:os.getcwd []\n", "line 1", "python/object"),
    written("empty file", "", "must hold sections", "NoneType"),
    written("a list", "- base\n", "must hold sections", "list"),
    written("two documents", EXPERIMENT + "---\n" + EXPERIMENT, "line 8", "another document"),
    added("key given twice", "lora: {rank: 8}\nlora: {rank: 4}\n", "line 9", "'lora' is given twice"),
    added("unknown section", "traning: {steps: 3}\n", "traning: unknown field", "did you mean training?"),
    added("unknown field", "lora: {rnk: 8}\n", "lora.rnk: unknown field", "did you mean rank?", "dropout"),
    added("number as key", "lora: {1: 8}\n", "lora.1", "Keys should be strings"),
    added("empty section", "lora:\n", "lora: must be a section of rank, alpha", "None"),
    command("missing file", ["check", "nope.yaml"], "nope.yaml: there is no such experiment file"),
    command("a folder for a file", ["check", "."], "there is no such experiment file"),
]

FIELDS = [
    overridden("wrong type", ["lora.rank=eight"], "x.yaml", "lora.rank", "valid integer", "'eight'"),
    overridden("text for a number", ["training.learning_rate='5e-5'"], "training.learning_rate", "valid number"),
    overridden("true for a number", ["lora.rank=true"], "lora.rank", "valid integer", "True"),
    overridden("fraction for a whole number", ["lora.rank=8.5"], "lora.rank", "valid integer", "8.5"),
    overridden("out of bounds below", ["lora.rank=0"], "lora.rank", "greater than or equal to 1", "0"),
    overridden("out of bounds above", ["lora.dropout=1.0"], "lora.dropout", "less than 1", "1.0"),
    overridden(
        "not one of", ["base.quantization=int2"], "base.quantization", "'nf4', 'fp4', 'int8' or 'none'", "'int2'"
    ),
    overridden(
        "unknown field in an override", ["tracking.wandb.projct=x"], "tracking.wandb.projct", "did you mean project?"
    ),
    overridden("unknown section in an override", ["lara.rank=3"], "lara: unknown field", "did you mean lora?"),
    overridden("override without =", ["lora.rank"], "--set lora.rank", "dotted.field=value"),
    overridden("override without field", ["=3"], "--set =3", "dotted.field=value"),
    overridden("override is not YAML", ["lora.rank=[8"], "--set lora.rank=[8", "not YAML"),
    overridden("override below a value", ["data.source.file=3"], "--set data.source.file=3", "not a section"),
    overridden(
        "steps and epochs", ["training.epochs=1"], "training", "steps or epochs, not both (steps=2, epochs=1.0)"
    ),
    overridden(
        "fp16 and bfloat16", ["training={precision: fp16, adapter_dtype: bfloat16}"], "training", "fp16", "bfloat16"
    ),
    overridden(
        "whole GPUs shared",
        ["resources={trials_per_gpu: 2, gpus_per_trial: 2}"],
        "resources: trials_per_gpu=2 shares one GPU",
        "gpus_per_trial=2",
    ),
    overridden(
        "missing template file", ["data.chat_template=nope.jinja"], "data.chat_template: 'nope.jinja' cannot be read"
    ),
    overridden(
        "template file that is none",
        ["data={source: x/y, format: messages, chat_template: x.yaml}"],
        "chat_template",
        "is not a Jinja template",
    ),
    overridden("negative rows", ["data.max_rows=0"], "data.max_rows", "greater than or equal to 1"),
    overridden(
        "unknown field of a mix", ["data.mix=[{source: a, wieght: 1}]"], "data.mix.0.wieght", "did you mean weight?"
    ),
    overridden(
        "held out two ways", ["data.held_out={share: 0.1, count: 3}"], "data.held_out", "exactly one of", "'count'"
    ),
    overridden("held out no way", ["data.held_out={}"], "data.held_out", "exactly one of share, count, source"),
    overridden("no template", ["data.template="], "data: format template needs a template"),
    overridden("a template unused", ["data.format=text"], "data: a template is given, but format is text"),
    overridden(
        "loss on what text has not", ["data={source: embedded, format: text, loss_on: completion}"], "data", "text"
    ),
    overridden(
        "exact match of text",
        ["data={source: embedded, format: text}", "evaluation.metrics=[exact_match]"],
        "evaluation.metrics",
        "format text",
    ),
    overridden("unknown metric", ["evaluation.metrics=[bleu]"], "evaluation.metrics: ", "'exact_match'", "'bleu'"),
    overridden(
        "metric not measured", ["search.metric=eval/exact_match"], "search.metric", "'eval/exact_match'", "eval/loss"
    ),
    overridden(
        "grace between evaluations",
        ["scheduler={kind: asha, grace_steps: 75}"],
        "scheduler.grace_steps (75)",
        "multiple of training.eval_steps (50)",
    ),
    overridden(
        "a first rung at the last step",
        ["scheduler={kind: asha, grace_steps: 50}", "training.steps=50", "search.space.lora.rank={choice: [4, 8]}"],
        "scheduler.kind: asha would have no effect",
        "no trial is evaluated before its last step (50)",
    ),
    overridden(
        "rungs that move",
        ["scheduler.kind=asha", "search.space.training.eval_steps={choice: [50, 100]}"],
        "training.eval_steps cannot be searched under scheduler asha",
    ),
    overridden("name with a slash", ["output.name=a/b"], "output.name", "'a/b'"),
    overridden(
        "infinite number",
        ["training.learning_rate=.inf"],
        "training.learning_rate",
    ),
    overridden(
        "override below a list",
        ["search.space=[1]", "search.space.lora.rank={choice: [1]}"],
        "--set",
    ),
    overridden("braces without quotes", ["data.template={question} {answer}"], "is not YAML", 'data.template="..."'),
    overridden("nobody's home", ["base.model=~nobody-at-all/base"], "base.model"),
    overridden("endless name", [f"base.model={'a' * 300}"], "base.model"),
    overridden("empty name", ["base.model=''"], "base.model"),
]


@pytest.mark.parametrize("wrong", [*FILES, *FIELDS], ids=lambda wrong: wrong.name.replace(" ", "-"))
def test_a_wrong_call_is_refused(wrong: Wrong, assert_refused: Callable[[Wrong], None]) -> None:
    assert_refused(wrong)

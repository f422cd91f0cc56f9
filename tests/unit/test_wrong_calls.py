"""What is wrong dies with exit code 2, one message that names the field or the file, and nothing written."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from orchestrator.cli import main

EXPERIMENT = """\
base: {model: embedded}
data:
  source: embedded
  format: template
  template: "{question} {answer}"
training: {steps: 2, batch_size: 2}
tracking: {tensorboard: false, wandb: {mode: disabled}}
"""


class Wrong(NamedTuple):
    """A wrong call, made in a folder with these files (x.yaml is there always)."""

    name: str
    call: list[str]
    words: tuple[str, ...]
    """What the message must hold."""
    files: dict[str, str | bytes] = {}
    """Where the package gets it wrong today."""


def _written(name: str, text: str | bytes, *words: str) -> Wrong:
    """A wrong experiment file."""
    return Wrong(name, ["check", "x.yaml"], ("x.yaml", *words), {"x.yaml": text})


def _added(name: str, text: str, *words: str) -> Wrong:
    """Wrong lines at the end of a right file."""
    return _written(name, EXPERIMENT + text, *words)


def _set(name: str, overrides: list[str], *words: str) -> Wrong:
    """Wrong overrides of a right file."""
    return Wrong(name, ["check", "x.yaml", *_options(overrides)], words)


def _trial(name: str, overrides: list[str], *words: str) -> Wrong:
    """What is found wrong once tokenizer and data are read."""
    return Wrong(name, ["trial", "x.yaml", *_options(overrides)], words)


def _rows(name: str, rows: str | bytes, *words: str, format: str = "text") -> Wrong:
    """A wrong data file."""
    overrides = ["data={source: rows.jsonl, format: " + format + "}"]
    return Wrong(name, ["trial", "x.yaml", *_options(overrides)], words, {"rows.jsonl": rows})


def _file(name: str, file: str, content: str, *words: str) -> Wrong:
    """A wrong data file of another kind."""
    overrides = ["data={source: ./" + file + ", format: text}"]
    return Wrong(name, ["trial", "x.yaml", *_options(overrides)], words, {file: content})


def _call(name: str, call: list[str], *words: str) -> Wrong:
    return Wrong(name, call, words)


def _options(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


FILES = [
    _written("missing section", "base: {model: embedded}\n", "data: Field required"),
    _written("not YAML", EXPERIMENT + "lora: ]\n", "line 8: is not YAML"),
    _written("a tab for space", "base:\n\tmodel: embedded\n", "line 2", "is not YAML"),
    _written("not UTF-8", EXPERIMENT.encode() + b"# \xff\n", "is not UTF-8"),
    _written("a control character", "base: \x00\n", "is not YAML"),
    _written("an object tag", "base: !!python/object/apply:os.getcwd []\n", "line 1", "python/object"),
    _written("empty file", "", "must hold sections", "NoneType"),
    _written("a list", "- base\n", "must hold sections", "list"),
    _written("two documents", EXPERIMENT + "---\n" + EXPERIMENT, "line 8", "another document"),
    _added("key given twice", "lora: {rank: 8}\nlora: {rank: 4}\n", "line 9", "'lora' is given twice"),
    _added("unknown section", "traning: {steps: 3}\n", "traning: unknown field", "did you mean training?"),
    _added("unknown field", "lora: {rnk: 8}\n", "lora.rnk: unknown field", "did you mean rank?", "dropout"),
    _added("number as key", "lora: {1: 8}\n", "lora.1", "Keys should be strings"),
    _added("empty section", "lora:\n", "lora: must be a section of rank, alpha", "None"),
    _call("missing file", ["check", "nope.yaml"], "nope.yaml: there is no such experiment file"),
    _call("a folder for a file", ["check", "."], "there is no such experiment file"),
]

FIELDS = [
    _set("wrong type", ["lora.rank=eight"], "x.yaml", "lora.rank", "valid integer", "'eight'"),
    _set("text for a number", ["training.learning_rate='5e-5'"], "training.learning_rate", "valid number"),
    _set("true for a number", ["lora.rank=true"], "lora.rank", "valid integer", "True"),
    _set("fraction for a whole number", ["lora.rank=8.5"], "lora.rank", "valid integer", "8.5"),
    _set("out of bounds below", ["lora.rank=0"], "lora.rank", "greater than or equal to 1", "0"),
    _set("out of bounds above", ["lora.dropout=1.0"], "lora.dropout", "less than 1", "1.0"),
    _set("not one of", ["base.quantization=int2"], "base.quantization", "'nf4', 'fp4', 'int8' or 'none'", "'int2'"),
    _set("unknown field in an override", ["tracking.wandb.projct=x"], "tracking.wandb.projct", "did you mean project?"),
    _set("unknown section in an override", ["lara.rank=3"], "lara: unknown field", "did you mean lora?"),
    _set("override without =", ["lora.rank"], "--set lora.rank", "dotted.field=value"),
    _set("override without field", ["=3"], "--set =3", "dotted.field=value"),
    _set("override is not YAML", ["lora.rank=[8"], "--set lora.rank=[8", "not YAML"),
    _set("override below a value", ["data.source.file=3"], "--set data.source.file=3", "not a section"),
    _set("steps and epochs", ["training.epochs=1"], "training", "steps or epochs, not both (steps=2, epochs=1.0)"),
    _set("fp16 and bfloat16", ["training={precision: fp16, adapter_dtype: bfloat16}"], "training", "fp16", "bfloat16"),
    _set(
        "whole GPUs shared",
        ["resources={trials_per_gpu: 2, gpus_per_trial: 2}"],
        "resources: trials_per_gpu=2 shares one GPU",
        "gpus_per_trial=2",
    ),
    _set("missing template file", ["data.chat_template=nope.jinja"], "data.chat_template: 'nope.jinja' cannot be read"),
    _set(
        "template file that is none",
        ["data={source: x/y, format: messages, chat_template: x.yaml}"],
        "chat_template",
        "is no Jinja template",
    ),
    _set("negative rows", ["data.max_rows=0"], "data.max_rows", "greater than or equal to 1"),
    _set("unknown field of a mix", ["data.mix=[{source: a, wieght: 1}]"], "data.mix.0.wieght", "did you mean weight?"),
    _set("held out two ways", ["data.held_out={share: 0.1, count: 3}"], "data.held_out", "exactly one of", "'count'"),
    _set("held out no way", ["data.held_out={}"], "data.held_out", "exactly one of share, count, source"),
    _set("no template", ["data.template="], "data: format template needs a template"),
    _set("a template unused", ["data.format=text"], "data: a template is given, but format is text"),
    _set("loss on what text has not", ["data={source: embedded, format: text, loss_on: completion}"], "data", "text"),
    _set(
        "exact match of text",
        ["data={source: embedded, format: text}", "evaluation.metrics=[exact_match]"],
        "evaluation.metrics",
        "format text",
    ),
    _set("unknown metric", ["evaluation.metrics=[bleu]"], "evaluation.metrics.0", "'exact_match'", "'bleu'"),
    _set("metric not measured", ["search.metric=eval/exact_match"], "search.metric", "'eval/exact_match'", "eval/loss"),
    _set(
        "grace between evaluations",
        ["scheduler={kind: asha, grace_steps: 75}"],
        "scheduler.grace_steps (75)",
        "multiple of training.eval_steps (50)",
    ),
    _set(
        "a first rung at the last step",
        ["scheduler={kind: asha, grace_steps: 50}", "training.steps=50", "search.space.lora.rank={choice: [4, 8]}"],
        "scheduler.kind: asha would change nothing",
        "no trial is evaluated before its last step (50)",
    ),
    _set(
        "rungs that move",
        ["scheduler.kind=asha", "search.space.training.eval_steps={choice: [50, 100]}"],
        "training.eval_steps cannot be searched under scheduler asha",
    ),
    _set("name with a slash", ["output.name=a/b"], "output.name", "'a/b'"),
    _set(
        "infinite number",
        ["training.learning_rate=.inf"],
        "training.learning_rate",
    ),
    _set(
        "override below a list",
        ["search.space=[1]", "search.space.lora.rank={choice: [1]}"],
        "--set",
    ),
    _set("braces without quotes", ["data.template={question} {answer}"], "is not YAML", 'data.template="..."'),
    _set("nobody's home", ["base.model=~nobody-at-all/base"], "base.model"),
    _set("endless name", [f"base.model={'a' * 300}"], "base.model"),
    _set("empty name", ["base.model=''"], "base.model"),
]

SEARCHES = [
    _set("unknown kind of axis", ["search.space.lora.rank={chioce: [1]}"], "search.space.lora.rank", "chioce"),
    _set("bare list as axis", ["search.space.lora.rank=[8, 16]"], "search.space.lora.rank", "{choice: [...]}"),
    _set("axis without values", ["search.space.lora.rank={choice: []}"], "search.space.lora.rank", "at least 1"),
    _set("low above high", ["search.space.lora.dropout={uniform: [0.3, 0.1]}"], "lora.dropout", "(low=0.3, high=0.1)"),
    _set("low as high", ["search.space.lora.rank={randint: [8, 8]}"], "lora.rank", "low < high"),
    _set(
        "logarithm of zero",
        ["search.space.training.learning_rate={loguniform: [0, 1e-3]}"],
        "search.space.training.learning_rate",
        "low > 0",
    ),
    _set("axis over no field", ["search.space.lora.rnk={choice: [8]}"], "there is no field lora.rnk", "rank, alpha"),
    _set("axis over no section", ["search.space.loar.rank={choice: [8]}"], "loar.rank", "base, lora or training"),
    _set("axis over held-out rows", ["search.space.data.seed={choice: [1, 2]}"], "data.seed cannot vary"),
    _set("axis value out of bounds", ["search.space.lora.rank={choice: [8, 0]}"], "lora.rank", "the value 0 gives"),
    _set("tied to no field", ["search.tied.lora.alpha=2 * lora.rnk"], "search.tied.lora.alpha", "no field lora.rnk"),
    _set("tied to a call", ["search.tied.lora.alpha=__import__('os')"], "search.tied.lora.alpha", "cannot use"),
    _set("tied to no arithmetic", ["search.tied.lora.alpha=2 *"], "search.tied.lora.alpha", "is not arithmetic"),
    _set(
        "tied and searched", ["search={space: {lora.rank: {choice: [1]}}, tied: {lora.rank: 1 + 1}}"], "both searched"
    ),
    _set("grid with a range", ["search={algorithm: grid, space: {lora.dropout: {uniform: [0, 0.1]}}}"], "lora.dropout"),
    _set("grid axis at random", ["search.space.lora.rank={grid: [8]}"], "lora.rank is a grid axis", "random"),
    _set("number of grid trials", ["search={algorithm: grid, num_trials: 3}"], "search: num_trials"),
    _set("no such algorithm", ["search.algorithm=bayes"], "search.algorithm", "'optuna'", "'bayes'"),
]

DATA = [
    _rows("not JSON", '{"text": "a"}\n{"text"\n', "rows.jsonl:2: is not JSON"),
    _rows("line not UTF-8", b'{"text": "a"}\n\n{"text": "\xff"}\n', "rows.jsonl:3: is not UTF-8 text"),
    _rows("not an object", '{"text": "a"}\n{"text": "b"}\n["c"]\n', "rows.jsonl:3", "JSON object", 'got ["c"]'),
    _rows("missing column", '{"text": "a"}\n{"txt": "b"}\n', "rows.jsonl:2", "no column 'text'", "txt"),
    _rows("column of another type", '{"text": "a"}\n{"text": ["b"]}\n', "rows.jsonl:2", "'text' must be text", "list"),
    _rows("null", '{"text": "a"}\n{"text": null}\n', "rows.jsonl:2", "'text' is empty"),
    _rows("not a number", '{"text": "a"}\n{"text": NaN}\n', "rows.jsonl:2", "'text' is empty"),
    _rows("empty value", '{"text": "a"}\n{"text": " "}\n', "rows.jsonl:2", "'text' is empty"),
    _rows("no row", "\n", "rows.jsonl: holds no row"),
    _rows("one row", '{"text": "a"}\n', "data.held_out takes 1 of 1 row:", "data.held_out.source"),
    _rows("one row without its column", '{"txt": "a"}\n', "rows.jsonl:1: there is no column 'text'", "'txt'"),
    _rows("no completion", '{"prompt": "a"}\n' * 2, "rows.jsonl:", "no column 'completion'", format="prompt"),
    _rows("messages of text", '{"messages": "a"}\n' * 2, "rows.jsonl:", "list of turns", format="messages"),
    _rows(
        "turn without content", '{"messages": [{"role": "user"}]}\n' * 2, "rows.jsonl:", "content", format="messages"
    ),
    _rows(
        "no answer",
        '{"messages": [{"role": "user", "content": "a"}]}\n' * 2,
        "rows.jsonl:",
        "last turn must be the assistant's",
        format="messages",
    ),
    _file(
        "CSV with a field too many", "rows.csv", "text\na\nb,c\n", "rows.csv:3: has 2 fields, and the header 1: text"
    ),
    _file(
        "JSON array with a number",
        "rows.json",
        '[{"text": "a"},\n3]',
        "rows.json:2 row 1: must be a JSON object, got 3",
    ),
    _file("Parquet that is none", "rows.parquet", "PAR", "rows.parquet: is not Parquet"),
    _file("a kind that is not known", "rows.md", "a\n", "rows.md: is of no known kind", ".jsonl"),
    _file("CSV with an empty value", "rows.csv", 'text\na\n" "\n', "rows.csv:3", "'text' is empty"),
    _rows("conversations of text", '{"conversations": 1}\n' * 2, "rows.jsonl:", "list of turns", format="sharegpt"),
    _rows("instruction without output", '{"instruction": "a"}\n' * 2, "no column 'output'", format="alpaca"),
    _rows(
        "tools the template leaves out",
        '{"tools": [{"name": "f"}], "messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}]}\n' * 2,
        "rows.jsonl:",
        "leaves the column tools out",
        format="messages",
    ),
    _trial("glob without files", ["data={source: 'a/*.csv', format: text}"], "a/*.csv: no file matches"),
    _trial(
        "rows too long for error",
        ["data.max_length=8", "data.truncate=error"],
        "data.max_length=8: 2000 of 2000 rows have more tokens: embedded:",
        "and 1997 more",
        "data.truncate is error",
    ),
    _set(
        "mix of names", ["data.source=", "data.mix=[a.csv]"], "data.mix.0: must be a section of source, weight", "a.csv"
    ),
    _set("base as a name", ["base=embedded"], "base: must be a section of model, revision", "'embedded'"),
    _set("rows by a URL", ["data.source=https://x.org/a.csv"], "data.source: 'https://x.org/a.csv' is a URL", "hub id"),
    _trial("missing file of a mix", ["data.source=", "data.mix=[{source: nope.csv}]"], "nope.csv: there is no such"),
    Wrong(
        "held-out file in the training folder",
        ["trial", "x.yaml", *_options(["data={source: ., format: text, held_out: {source: ./rows.jsonl}}"])],
        ("data.held_out: ", "rows.jsonl is among the training rows"),
        {"rows.jsonl": '{"text": "a"}\n'},
    ),
    Wrong(
        "preview of a bad row",
        ["data", "x.yaml", *_options(["data={source: rows.jsonl, format: text}"])],
        ("rows.jsonl:2", "no column 'text'"),
        {"rows.jsonl": '{"text": "a"}\n{}\n'},
    ),
    Wrong(
        "preview of rows of no format",
        ["data", "rows.jsonl"],
        ("rows.jsonl:1: columns 'a', 'b' are those of no format", "data.format=template"),
        {"rows.jsonl": '{"a": 1, "b": 2}\n'},
    ),
    Wrong("preview of no file", ["data", "nope.jsonl"], ("nope.jsonl: there is no such data file",)),
    Wrong(
        "training on rows without an experiment",
        ["sweep", "rows.jsonl"],
        ("rows.jsonl: holds rows, and is no experiment file", "data.source", "orchestrator data rows.jsonl"),
        {"rows.jsonl": '{"text": "a"}\n'},
    ),
    _trial("missing data file", ["data.source=nope.jsonl"], "nope.jsonl: there is no such data file"),
    _trial("missing held-out file", ["data.held_out={source: ./nope}"], "nope: there is no such data file"),
    _trial("no such data set", ["data.source=nobody/nothing"], "nobody/nothing", "cannot be loaded from the hub"),
    _trial("held out takes all", ["data.held_out={count: 2000}"], "data.held_out takes 2000 of 2000 rows"),
    _trial("template without fields", ["data.template=hello"], "data.template 'hello'", "{column} fields"),
    _trial("template without names", ["data.template='{} {0}'"], "data.template", "a field has no name"),
    _trial("template malformed", ["data.template='{question} {answer'"], "data.template", "a single '{'", "{{ or }}"),
    _trial("template over no column", ["data.template='{question} {reply}'"], "embedded:", "no column 'reply'"),
    _trial(
        "template as a number",
        ["data.template='{question:d} {answer}'"],
        "there is no column 'question:d'",
    ),
    _trial(
        "template in a field",
        ["data.template='{question:{w}} {answer}'"],
        "data.template",
    ),
    _trial(
        "nothing to learn",
        ["data.max_length=8", "data.loss_on=completion"],
        "data.max_length=8 leaves no training row",
        "embedded:1 (25)",
    ),
    _trial("folder without a model", ["base.model=./nope"], "base.model", "nope", "no config.json"),
    _trial("no such model", ["base.model=nobody/nothing"], "base.model nobody/nothing: cannot be loaded"),
    _trial("pad token not known", ["base.pad_token=<fill>"], "base.pad_token '<fill>'", "not a token of embedded"),
    _trial("output is a URI", ["output.folder=s3://bucket/runs"], "s3://bucket/runs", "not a URI"),
    _call("option is a URI", ["trial", "x.yaml", "--output", "gs://b"], "gs://b", "not a URI"),
    _call("sweep to a URI", ["sweep", "x.yaml", "--output", "gs://b"], "gs://b", "not a URI"),
    _call("folder is there", ["trial", "x.yaml", "--output", "sweeps", "--name", "open"], "open", "already exists"),
    _call("sweep is there", ["sweep", "x.yaml", "--output", "sweeps", "--name", "open"], "open", "resume"),
    _call("output is a file", ["trial", "x.yaml", "--output", "x.yaml"], "output x.yaml", "not a folder"),
    _call(
        "name leaves the folder",
        ["trial", "x.yaml", "--name", "../out", "--set", "base.pad_token=<fill>"],
        "../out",
    ),
]

CALLS = [
    _call("no such verb", ["swep", "x.yaml"], "swep"),
    _call("no such option", ["check", "x.yaml", "--jsn"], "--jsn"),
    _call("no file", ["check"], "file"),
    _call("rows below zero", ["data", "x.yaml", "--rows", "-1"], "--rows"),
    _call("tasks' folder without tasks", ["evaluate", "x", "--tasks-folder", "t"], "--tasks-folder t", "--tasks."),
    _call("no such port", ["board", "sweeps/open", "--port", "70000"], "--port", "65535"),
    *(
        _call(f"{verb} of no sweep", [verb, "nope"], "nope: there is no such sweep", "--output")
        for verb in ("status", "best", "resume", "board", "chat")
    ),
    _call("sweep of another folder", ["status", "open", "--output", "nope"], "open: there is no such sweep"),
    _call("damaged sweep", ["status", "sweeps/damaged"], "damaged/sweep.json", "damaged"),
    _call("draws without a temperature", ["chat", "sweeps/done", "--seed", "1"], "--seed: has no effect on greedy"),
    _call("prompts without answers", ["chat", "sweeps/done", "--prompts", "p.txt"], "--answers"),
    _call("verify of no bundle", ["verify", "sweeps/half"], "half: has no manifest.json"),
    _call("push of no bundle", ["push", "sweeps/half", "--repo", "a/b"], "half: has no manifest.json"),
    _call("push to no name", ["push", "sweeps/half", "--repo", "a/b/c"], "--repo 'a/b/c'", "owner/name"),
    _call("best of none", ["best", "sweeps/open"], "sweeps/open: no trial has finished", "status"),
    _call("chat with none", ["chat", "sweeps/open", "--prompt", "a"], "sweeps/open: no trial has finished"),
    _call("export of none", ["best", "sweeps/open", "--export", "out"], "no trial has finished"),
    _call("export over files", ["best", "sweeps/done", "--export", "sweeps"], "sweeps: already exists"),
    _call("export over a file", ["best", "sweeps/done", "--export", "x.yaml"], "x.yaml: already exists"),
    _call("export below a file", ["best", "sweeps/done", "--export", "x.yaml/a"], "x.yaml"),
    _call("adapter is not whole", ["chat", "sweeps/half", "--prompt", "a"], "half", "adapter_model.safetensors"),
    _call("no TensorBoard", ["board", "sweeps/open"], "sweeps/open: has no TensorBoard records"),
    _call("chat with a folder", ["chat", "sweeps"], "sweeps: contains neither a sweep", "nor an adapter"),
    _call("chat with a file", ["chat", "x.yaml"], "x.yaml: there is no such sweep"),
    _call("chat of no tokens", ["chat", "sweeps/done", "--max-new-tokens", "0"], "--max-new-tokens"),
    _call("endless name of a sweep", ["status", "a" * 300], "a" * 300),
]

MISUSES = [
    _set(
        "held out is the training source",
        ["data.held_out={source: embedded}"],
        "held_out.source is the training source",
    ),
    _set("part of no source", ["data.held_out={share: 0.1, max_rows: 5}"], "data.held_out", "none is given"),
    _set("configuration of a file", ["data.config=main"], "data", "config belongs to a hub data set"),
    _set("warmup without an end", ["training.steps=20", "training.warmup=500"], "warmup (500 steps) must end before"),
    _set("tie to itself", ["search.tied.lora.alpha=2 * lora.alpha"], "reads lora.alpha, which is tied itself"),
    _set(
        "tie to a later tie",
        ["search.tied={lora.alpha: 2 * lora.rank, lora.rank: 8 * training.batch_size}"],
        "reads lora.rank, which is tied itself",
    ),
    _trial("more GPUs than there are", ["resources.gpus_per_trial=1"], "gpus_per_trial=1", "has 0 GPUs"),
]

WRONG = [*MISUSES, *FILES, *FIELDS, *SEARCHES, *DATA, *CALLS]


@pytest.fixture
def work(tmp_path: Path, make_sweep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an experiment, an open sweep, a finished one, a damaged one and half an adapter."""
    (tmp_path / "x.yaml").write_text(EXPERIMENT, encoding="utf-8")
    make_sweep(tmp_path / "sweeps" / "open", {"a": ("RUNNING", 0.5)})
    done = make_sweep(tmp_path / "sweeps" / "done", {"a": ("COMPLETE", 0.5)})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (done.trial("a").adapter(7) / name).write_text("{}", encoding="utf-8")
    (tmp_path / "sweeps" / "damaged").mkdir()
    (tmp_path / "sweeps" / "damaged" / "sweep.json").write_text('{"name": ', encoding="utf-8")
    (tmp_path / "sweeps" / "half").mkdir()
    (tmp_path / "sweeps" / "half" / "adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a trial here sets it for its process
    return tmp_path


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name.replace(" ", "-"))
def test_a_wrong_call(
    wrong: Wrong, work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, content in wrong.files.items():
        (work / name).write_bytes(content.encode() if isinstance(content, str) else content)
    before = _contents(work)
    monkeypatch.setattr(sys, "argv", ["orchestrator", *wrong.call])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capfd.readouterr()
    assert exit_.value.code == 2
    for word in wrong.words:
        assert word in err
    assert "Traceback" not in err
    assert out.strip() == ""  # `trial` leaves an empty line: see the test below
    assert _contents(work) == before


@pytest.mark.usefixtures("work")
def test_a_refused_trial_prints_not_even_an_empty_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["orchestrator", "trial", "x.yaml", "--set", "base.pad_token=<fill>"])
    with pytest.raises(SystemExit):
        main()
    assert capfd.readouterr().out == ""


def test_the_table_is_not_empty_and_no_name_stands_twice() -> None:
    assert len(WRONG) > 90
    assert len({wrong.name for wrong in WRONG}) == len(WRONG)
    assert all(wrong.words for wrong in WRONG)


@pytest.mark.usefixtures("work")
def test_the_experiment_is_right_but_for_what_the_table_adds(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["orchestrator", "check", "x.yaml"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert "# valid: 1 trial\n" in capfd.readouterr().out


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, with what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}

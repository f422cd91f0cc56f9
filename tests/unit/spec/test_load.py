from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.data.files import data_files
from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.errors import DataError, SpecError
from orchestrator.spec import load_spec, parse_spec

EXPERIMENT = """\
base: {model: embedded}
data:
  source: embedded
  format: template
  template: "{question} {answer}"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return _write(tmp_path / "experiments" / "x.yaml", EXPERIMENT)


@pytest.mark.parametrize("text", ["5e-5", "5E-5", "5.e-5", ".5e-4", "+5e-5", "0.5e-4", "50e-6", "0.00005"])
def test_a_number_without_a_point_is_a_number(file: Path, text: str) -> None:
    _write(file, f"{EXPERIMENT}training: {{learning_rate: {text}}}\n")
    assert load_spec(file).training.learning_rate == pytest.approx(5e-5)
    assert load_spec(file, [f"training.learning_rate={text}"]).training.learning_rate == pytest.approx(5e-5)
    axis = load_spec(file, [f"search.space.training.learning_rate={{loguniform: [{text}, 1e-3]}}"]).search.space
    assert axis["training.learning_rate"].values == pytest.approx([5e-5, 1e-3])


@pytest.mark.parametrize("text", ["e5", "5e", "5e-5x", "a5e-5", "'5e-5'"])
def test_text_that_looks_like_a_number_stays_text(file: Path, text: str) -> None:
    assert load_spec(file, [f"output.name={text}"]).output.name == text.strip("'")


@pytest.mark.parametrize(
    ("added", "line", "key"),
    [
        ("lora: {rank: 8}\nlora: {rank: 16}\n", 7, "'lora'"),
        ("training:\n  steps: 3\n  seed: 0\n  steps: 4\n", 9, "'steps'"),
        ("search:\n  space:\n    lora.rank: {choice: [1]}\n    lora.rank: {choice: [2]}\n", 9, "'lora.rank'"),
        ("search: {space: {lora.rank: {choice: [1], choice: [2]}}}\n", 6, "'choice'"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(file: Path, added: str, line: int, key: str) -> None:
    _write(file, EXPERIMENT + added)
    with pytest.raises(SpecError, match=rf"x\.yaml: line {line}: {key} is given twice"):
        load_spec(file)


def test_a_key_twice_in_an_override_names_the_override(file: Path) -> None:
    with pytest.raises(SpecError, match=r"--set lora=.*'rank' is given twice"):
        load_spec(file, ["lora={rank: 8, rank: 16}"])


def test_relative_paths_start_at_the_files_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(file, EXPERIMENT.replace("source: embedded", "source: rows.jsonl\n  held_out: {source: ../held.json}"))
    (file.parent / "base").mkdir()
    for folder in (file.parent, file.parent.parent, Path("/")):
        monkeypatch.chdir(folder)
        spec = load_spec(file, ["lora.rank=8"])
        assert spec.data.source == str(file.parent / "rows.jsonl")
        assert spec.data.held_out.source == str(file.parent.parent / "held.json")
    _write(file, EXPERIMENT.replace("model: embedded", "model: base"))
    assert load_spec(file).base.model == str(file.parent / "base"), "a folder that is there is a path"


def test_relative_paths_in_overrides_start_at_the_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    (work / "mine").mkdir(parents=True)
    monkeypatch.chdir(work)
    overrides = ["base.model=mine", "data.source=rows.jsonl", "data.held_out={source: ./held.jsonl}"]
    spec = load_spec(file, overrides)
    assert spec.base.model == str(work / "mine")
    assert spec.data.source == str(work / "rows.jsonl")
    assert spec.data.held_out.source == str(work / "held.jsonl")


def test_globs_mixes_and_template_files_start_at_the_files_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    _write(file.parent / "deep" / "chat.jinja", template)
    (file.parent / "saved").mkdir()
    mix = "mix: [{source: a.csv}, {source: 'b/**/part-*'}, {source: saved, split: dev}, {source: owner/rows}]"
    held_out = "held_out: {mix: [{source: ../held.json}, {source: owner/held}]}"
    text = f"base: {{model: embedded}}\ndata:\n  {mix}\n  {held_out}\n  format: messages\n"
    _write(file, text + "  chat_template: deep/chat.jinja\n")
    for folder in (file.parent, Path("/")):
        monkeypatch.chdir(folder)
        data = load_spec(file).data
        found = [source.source for source in (*data.sources, *data.held_out.sources)]
        here = file.parent
        assert found == [
            f"{here}/a.csv", f"{here}/b/**/part-*", f"{here}/saved", "owner/rows", f"{tmp_path}/held.json",
            "owner/held",
        ]  # fmt: skip
        assert [source.used_split for source in data.sources] == [None, None, "dev", "train"]
        assert [source.used_split for source in data.held_out.sources] == [None, "test"]
        assert data.chat_template == template, "the text, which goes wherever the trial goes"
    spec = load_spec(file)
    (file.parent / "deep" / "chat.jinja").unlink()
    assert parse_spec(spec.model_dump(mode="json")) == spec


def test_brackets_in_the_name_of_the_files_folder_are_not_a_pattern(tmp_path: Path) -> None:
    here, other = tmp_path / "e[1]", tmp_path / "e1"
    for folder in (here, other):
        _write(folder / "a.jsonl", "")
        (folder / "saved").mkdir()
    _write(other / "gone.jsonl", "")
    mix = "[{source: ./*.jsonl}, {source: a.jsonl}, {source: ./saved, split: dev}, {source: ./gone.jsonl}]"
    _write(here / "x.yaml", EXPERIMENT.replace("source: embedded", f"mix: {mix}"))
    glob, literal, saved, gone = load_spec(here / "x.yaml").data.sources
    assert data_files(Path(glob.source)) == [here / "a.jsonl"]
    assert (literal.source, saved.source, saved.used_split) == (f"{here}/a.jsonl", f"{here}/saved", "dev")
    with pytest.raises(DataError, match="no file matches"):
        data_files(Path(gone.source))


def test_home_is_expanded(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_spec(file, ["base.model=~/base"]).base.model == str(tmp_path / "base")


def test_hub_ids_and_embedded_are_not_changed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(file, EXPERIMENT.replace("model: embedded", "model: owner/base"))
    (file.parent / "embedded").mkdir()
    monkeypatch.chdir(file.parent)
    spec = load_spec(file, ["data.held_out={source: owner/rows, split: test}"])
    assert (spec.base.model, spec.data.source, spec.data.held_out.source) == ("owner/base", "embedded", "owner/rows")


def test_a_hub_id_in_the_file_means_the_same_from_every_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(file, EXPERIMENT.replace("model: embedded", "model: owner/base"))
    (tmp_path / "owner" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load_spec(file, ["lora.rank=8"]).base.model == "owner/base"


@pytest.mark.parametrize(
    ("overrides", "field", "wanted"),
    [
        (["lora.rank=8"], "lora.rank", 8),
        (["lora.rank=8", "lora.rank=4"], "lora.rank", 4),
        (["training={steps: 3, seed: 1}", "training.seed=2"], "training.steps", 3),
        (["tracking.wandb.mode=disabled"], "tracking.wandb.mode", "disabled"),
        (["lora.target_modules=[q_proj, v_proj]"], "lora.target_modules", ["q_proj", "v_proj"]),
        (["data.template='{question} = {answer}'"], "data.template", "{question} = {answer}"),
        (["data.held_out={count: 3}"], "data.held_out.count", 3),
        (["training.steps=3", "training.steps="], "training.steps", None),
        (["search.tied.lora.alpha=2 * lora.rank"], "search.tied", {"lora.alpha": "2 * lora.rank"}),
        (["search.num_trials=3"], "search.num_trials", 3),
    ],
)
def test_overrides(file: Path, overrides: list[str], field: str, wanted: Any) -> None:
    value: Any = load_spec(file, overrides)
    for name in field.split("."):
        value = getattr(value, name)
    assert value == wanted


def test_an_override_adds_or_replaces_a_whole_axis(file: Path) -> None:
    override = "search.space.lora.rank={choice: [1, 2]}"
    assert load_spec(file, [override]).model_dump()["search"]["space"] == {"lora.rank": {"choice": [1, 2]}}
    _write(file, EXPERIMENT + "search: {space: {lora.rank: {randint: [4, 9]}, lora.dropout: {choice: [0.1]}}}\n")
    space = load_spec(file, [override]).model_dump()["search"]["space"]
    assert space == {"lora.rank": {"choice": [1, 2]}, "lora.dropout": {"choice": [0.1]}}


def test_defaults_are_resolved(file: Path) -> None:
    spec = load_spec(file)
    assert spec.base.quantization == "nf4"
    assert spec.base.double_quant is True
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.target_modules) == (16, 32, "all-linear")
    assert (spec.training.learning_rate, spec.training.batch_size) == (2e-4, 4)
    assert spec.data.held_out.share == 0.1
    assert (spec.search.algorithm, spec.search.total_trials) == ("auto", 1)
    assert spec.grace_steps == spec.training.eval_steps == 50
    assert load_spec(file, ["training.eval_steps=20"]).grace_steps == 20
    assert load_spec(file, ["scheduler={kind: asha, grace_steps: 200}"]).grace_steps == 200


def test_a_resolved_experiment_can_be_read_again(file: Path) -> None:
    spec = load_spec(file, ["search.space.lora.rank={choice: [1, 2]}", "search.tied.lora.alpha=2 * lora.rank"])
    assert parse_spec(spec.model_dump(mode="json")) == spec
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_a_spec_is_frozen(file: Path) -> None:
    spec = load_spec(file)
    with pytest.raises(ValidationError, match="frozen"):
        spec.lora = spec.lora  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        spec.lora.rank = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        spec.data.held_out.share = 0.5  # type: ignore[misc]


def test_every_fault_has_its_line(file: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(file, ["lora.rank=0", "training.stps=3", "data.format=xml"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{file}: ") for line in lines)
    assert [line.removeprefix(f"{file}: ").partition(":")[0] for line in lines] == [
        "data.format",
        "lora.rank",
        "training.stps",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.recompute=maybe", "training.recompute: Input should be 'auto' or Input should be a valid boolean"),
        ("lora.target_modules=3", "lora.target_modules: Input should be 'all-linear' or Input should be a valid list"),
        ("lora.target_modules=[3]", "lora.target_modules.0: Input should be a valid string (got 3)"),
        ("resources.trials_per_gpu=0", "resources.trials_per_gpu: Input should be greater than or equal to 1 or"),
        ("lora.rank_pattern={q_proj: 0}", "lora.rank_pattern.q_proj: Input should be greater than or equal to 1"),
    ],
)
def test_a_field_of_several_types_is_named_without_the_type(file: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(file, [override])
    assert f"{file}: {message}" in str(caught.value)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_field_that_is_set_is_no_longer_searched_or_tied() -> None:
    spec = load_spec(DEMO, ["lora.alpha=8", "training.learning_rate=1e-3"])
    assert spec.search.space.keys() == {"lora.rank", "lora.dropout"}
    assert spec.search.tied == {}
    config = spec.trial_config({"lora.rank": 32, "lora.dropout": 0.0})
    assert (config.lora.rank, config.lora.alpha, config.training.learning_rate) == (32, 8, 1e-3)
    again = ["training.learning_rate=1e-3", "search.space.training.learning_rate={choice: [1e-4]}"]
    assert "training.learning_rate" in load_spec(DEMO, again).search.space

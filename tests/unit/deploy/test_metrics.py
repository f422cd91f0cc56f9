"""Metrics of answers, held against values worked out by hand; packages that are missing."""

import math
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from orchestrator.adapters.generate import matches
from orchestrator.deploy.scoring.harness import open_harness
from orchestrator.deploy.scoring.metrics import answer_metrics, perplexity, require_packages
from orchestrator.errors import RequestError

WANTED = ["the cat sat on the mat", "four plus four is eight"]


def test_perplexity() -> None:
    assert perplexity(math.log(2)) == pytest.approx(2)
    assert perplexity(1e4) == math.inf


def test_exact_match_does_not_count_space_at_the_ends() -> None:
    said = [" the cat sat on the mat\n", "four plus four is Eight"]
    assert matches(said, WANTED) == [True, False]
    assert answer_metrics(said, WANTED, ["exact_match"]) == {"exact_match": 0.5}


def test_rouge_is_the_mean_f1_of_longest_common_subsequences() -> None:
    # "the cat on mat": 4 of 4 words said, 4 of 6 wanted; nothing in common in the second.
    found = answer_metrics(["the cat on mat", "nothing"], WANTED, ["rouge"])
    assert found == {"rougeL": pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6) / 2)}


def test_bleu_is_of_the_corpus_and_from_0_to_100() -> None:
    assert answer_metrics(WANTED, WANTED, ["bleu"])["bleu"] == pytest.approx(100)
    short = ["the cat sat on the", "four plus four is eight"]  # all right, but 10 words for 11
    assert answer_metrics(short, WANTED, ["bleu"])["bleu"] == pytest.approx(100 * math.exp(1 - 11 / 10))
    said = ["the cat sat on the mat", "four plus four eight is"]
    # All words, and of the pairs, triples and quadruples those that lie before the two that changed places.
    precision = [11 / 11, 7 / 9, 5 / 7, 3 / 5]
    assert answer_metrics(said, WANTED, ["bleu"])["bleu"] == pytest.approx(100 * math.prod(precision) ** 0.25)


@pytest.mark.parametrize(("metric", "package"), [("rouge", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_package_is_told_with_what_installs_it(
    metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_packages(["loss", "exact_match", metric])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequestError, match=f"metric {metric} needs the package {package}") as told:
        require_packages(["loss", "exact_match", metric])
    assert "[metrics]" in told.value.remedy


def test_the_harness_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RequestError, match="--tasks needs the package lm_eval") as told:
        open_harness(["hellaswag"])
    assert "[harness]" in told.value.remedy


class _Tasks:
    """As lm_eval's TaskManager: files that it cannot read are passed over, and a task's Python runs as it is loaded."""

    fault: Exception | None = None

    def __init__(self, include_path: str | None) -> None:
        self.all_tasks: list[str] = []
        for path in Path(include_path or ".").rglob("*.yaml"):
            with suppress(yaml.YAMLError):
                loaded = yaml.safe_load(path.read_text().replace("!function", ""))
                self.all_tasks.append(loaded["task"])

    def load(self, _: list[str]) -> None:
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one task, for a harness that is not installed everywhere."""
    package, room = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.__spec__ = ModuleSpec("lm_eval", None)
    room.TaskManager = _Tasks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", room)
    (tmp_path / "which.yaml").write_text("task: which\ndoc_to_text: !function utils.text\n")
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (ModuleNotFoundError("No module named 'nltk'"), "ModuleNotFoundError: No module named 'nltk'"),
        (AttributeError("Module 'utils.py' has no function 'text'"), "AttributeError: Module 'utils.py' has no"),
        (SyntaxError("invalid syntax"), "SyntaxError: invalid syntax"),
        (NotImplementedError(), "NotImplementedError$"),
    ],
)
def test_what_a_tasks_python_raises_is_told(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, told: str
) -> None:
    assert open_harness(["which"], tasks).tasks == ["which"]
    monkeypatch.setattr(_Tasks, "fault", fault)
    with pytest.raises(RequestError, match=f"^--tasks which: cannot be loaded: {told}"):
        open_harness(["which"], tasks)


def test_a_task_whose_file_is_not_yaml_is_told_as_such(tasks: Path) -> None:
    with pytest.raises(RequestError, match="--tasks 'other': lm-evaluation-harness has no such task"):
        open_harness(["other"], tasks)
    (tasks / "deep").mkdir()
    (tasks / "deep" / "other.yaml").write_text("task: other\ndoc_to_choice: [a, b\n")
    assert open_harness(["which"], tasks).tasks == ["which"], "which is nobody's business"
    with pytest.raises(
        RequestError, match=r"--tasks 'other': is not found, and \S+/deep/other\.yaml: line 3: is not YAML: expected"
    ):
        open_harness(["other"], tasks)

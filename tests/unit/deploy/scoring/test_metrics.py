"""Metrics of answers, compared with values computed by hand; missing packages; tasks of the harness."""

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

EXPECTED = ["the cat sat on the mat", "four plus four is eight"]


def test_perplexity() -> None:
    assert perplexity(math.log(2)) == pytest.approx(2)
    assert perplexity(1e4) == math.inf


def test_exact_match_ignores_outer_whitespace() -> None:
    answers = [" the cat sat on the mat\n", "four plus four is Eight"]
    assert matches(answers, EXPECTED) == [True, False]
    assert answer_metrics(answers, EXPECTED, ["exact_match"]) == {"exact_match": 0.5}


def test_rouge_is_the_mean_f1_of_longest_common_subsequences() -> None:
    # "the cat on mat": precision 4/4, recall 4/6; the second answer has nothing in common.
    found = answer_metrics(["the cat on mat", "nothing"], EXPECTED, ["rouge"])
    assert found == {"rougeL": pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6) / 2)}


def test_bleu_is_a_corpus_score_from_0_to_100() -> None:
    assert answer_metrics(EXPECTED, EXPECTED, ["bleu"])["bleu"] == pytest.approx(100)
    short = ["the cat sat on the", "four plus four is eight"]  # all words correct, but 10 instead of 11
    assert answer_metrics(short, EXPECTED, ["bleu"])["bleu"] == pytest.approx(100 * math.exp(1 - 11 / 10))
    answers = ["the cat sat on the mat", "four plus four eight is"]
    # All unigrams match; n-grams match up to the two swapped words.
    precision = [11 / 11, 7 / 9, 5 / 7, 3 / 5]
    assert answer_metrics(answers, EXPECTED, ["bleu"])["bleu"] == pytest.approx(100 * math.prod(precision) ** 0.25)


@pytest.mark.parametrize(("metric", "package"), [("rouge", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_missing_package_is_reported_with_its_extra(
    metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_packages(["loss", "exact_match", metric])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequestError, match=f"metric {metric} needs the package {package}") as caught:
        require_packages(["loss", "exact_match", metric])
    assert "[metrics]" in caught.value.remedy


def test_a_missing_harness_is_reported_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RequestError, match="--tasks needs the package lm_eval") as caught:
        open_harness(["hellaswag"])
    assert "[harness]" in caught.value.remedy


class _Tasks:
    """Like lm_eval's TaskManager: skips files that are not YAML, and runs a task's Python on loading."""

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
    """A folder with one task, and a fake lm_eval, which is not installed everywhere."""
    package, tasks_module = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.__spec__ = ModuleSpec("lm_eval", None)
    tasks_module.TaskManager = _Tasks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks_module)
    (tmp_path / "which.yaml").write_text("task: which\ndoc_to_text: !function utils.text\n")
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (ModuleNotFoundError("No module named 'nltk'"), "ModuleNotFoundError: No module named 'nltk'"),
        (AttributeError("Module 'utils.py' has no function 'text'"), "AttributeError: Module 'utils.py' has no"),
        (SyntaxError("invalid syntax"), "SyntaxError: invalid syntax"),
        (NotImplementedError(), "NotImplementedError$"),
    ],
)
def test_errors_of_a_tasks_python_are_reported(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, message: str
) -> None:
    assert open_harness(["which"], tasks).tasks == ["which"]
    monkeypatch.setattr(_Tasks, "fault", fault)
    with pytest.raises(RequestError, match=f"^--tasks which: cannot be loaded: {message}"):
        open_harness(["which"], tasks)


def test_a_task_file_that_is_not_yaml_is_reported(tasks: Path) -> None:
    with pytest.raises(RequestError, match="--tasks 'other': lm-evaluation-harness has no such task"):
        open_harness(["other"], tasks)
    (tasks / "deep").mkdir()
    (tasks / "deep" / "other.yaml").write_text("task: other\ndoc_to_choice: [a, b\n")
    assert open_harness(["which"], tasks).tasks == ["which"], "other tasks are not affected"
    with pytest.raises(
        RequestError,
        match=r"--tasks 'other': there is no such task; \S+/deep/other\.yaml: line 3: is not valid YAML: expected",
    ):
        open_harness(["other"], tasks)

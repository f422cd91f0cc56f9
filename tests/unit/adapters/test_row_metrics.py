"""Metrics of answers row by row: the contract of a user's own function, and what is said when it breaks."""

from hashlib import sha256

import pytest

from orchestrator.adapters.row_metrics import AnsweredRows, score_rows_by, try_own_metrics
from orchestrator.errors import MetricError, RequestError
from orchestrator.record.models import metric_values
from orchestrator.spec.sections import OwnMetric

ROWS = AnsweredRows(["1 + 1 =", "2 + 2 =", "3 + 3 ="], ["2", "five", "6"], ["2", "4", " 6 "])


SCORE = "def {name}(prompts, answers, references):\n    return [float(id(LOADED))] * len(answers)"


def own(body: str, before: str = "") -> OwnMetric:
    """Make a metric `score` of one expression over prompts, answers and references."""
    source = f"{before}\ndef score(prompts, answers, references):\n    return {body}\n"
    return OwnMetric(file="/m/score.py", function="score", sha256=sha256(source.encode()).hexdigest(), source=source)


def test_each_metric_has_a_number_for_each_row() -> None:
    metric = own("[len(p) + len(a) + len(r) for p, a, r in zip(prompts, answers, references)]")
    assert score_rows_by(["exact_match", metric], ROWS) == {"exact_match": [1, 0, 1], "score": [9, 12, 11]}


@pytest.mark.parametrize("body", ["tuple(1.0 for _ in answers)", "numpy.ones(len(answers))", "[True] * len(answers)"])
def test_a_tuple_an_array_and_booleans_are_numbers_too(body: str) -> None:
    assert score_rows_by([own(body, "import numpy")], ROWS) == {"score": [1.0, 1.0, 1.0]}


def test_a_function_may_use_what_its_file_defines_and_change_its_arguments() -> None:
    before = "from dataclasses import dataclass\n@dataclass\nclass Part:\n    text: 'str'\n"
    rows = AnsweredRows(["a"], ["b"], ["c"])
    assert score_rows_by([own("[len(Part(answers.pop()).text)]", before)], rows) == {"score": [1.0]}
    assert rows.answers == ["b"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[int(a) for a in answers]", r"failed on row 1 \(answer 'five', reference '4'\): ValueError: .* \(line 3\)"),
        ("1 / (len(answers) - 3)", "failed on all rows together: ZeroDivisionError"),
        ("0.5", "returned float, not a list of numbers, one for each row"),
        ("[1.0]", "returned 1 numbers for 3 rows"),
        ("[1.0, float('nan'), 1.0]", r"returned nan for row 1 \(answer 'five', reference '4'\), not a finite number"),
        ("[1.0, 1.0, None]", r"returned None for row 2 \(answer '6', reference ' 6 '\), not a finite number"),
        ("answers", "returned '2' for row 0"),
        ("[10**400] * len(answers)", r"returned 10+.* for row 0 .*, not a finite number"),
        ("[float(a) if a != 'five' else sys.exit('bad') for a in answers]", r"failed on row 1 .*: SystemExit: bad"),
    ],
)
def test_a_fault_names_the_function_and_the_row(body: str, message: str) -> None:
    with pytest.raises(MetricError, match=r"^evaluation\.metrics: score of /m/score\.py " + message) as caught:
        score_rows_by([own(body, "import sys")], ROWS)
    assert caught.value.cause == "infrastructure", "the searcher must not learn from it"


def test_a_file_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(MetricError, match=r"score\.py cannot be loaded: ModuleNotFoundError: .*'nowhere'"):
        score_rows_by([own("[]", "import nowhere")], ROWS)
    with pytest.raises(MetricError, match=r"score\.py cannot be loaded: SystemExit: 3 \(line 1\)"):
        score_rows_by([own("[]", "raise SystemExit(3)")], ROWS)


def test_what_a_metric_prints_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert score_rows_by([own("print('called') or [1.0] * len(answers)", "print('loaded')")], ROWS)
    assert capsys.readouterr() == ("", "loaded\ncalled\n")


def test_a_file_with_two_metrics_runs_once() -> None:
    """Such a file may load a large model. Both functions return the address of what it has loaded."""
    source = "\n".join(["LOADED = object()", *(SCORE.format(name=name) for name in ("one", "other"))])
    both = [
        OwnMetric(file="/m/two.py", function=name, sha256=sha256(source.encode()).hexdigest(), source=source)
        for name in ("one", "other")
    ]
    found = score_rows_by(both, ROWS)
    assert found["one"] == found["other"]


def test_a_metric_is_tried_on_one_row_with_the_right_answer() -> None:
    try_own_metrics([own("[float(a == r and p == 'Q') for p, a, r in zip(prompts, answers, references)]")], "Q", "A")
    with pytest.raises(RequestError, match=r"failed on row 0 .*\(tried with its reference as the answer\)"):
        try_own_metrics([own("[int(a) for a in answers]")], "Q", "A")


def test_the_standard_error_is_that_of_a_mean() -> None:
    """The rows 1, 0, 0, 1 have the standard deviation sqrt(1 / 3), which is divided by sqrt(4)."""
    values = metric_values({"score": [1.0, 0.0, 0.0, 1.0], "one": [0.5]})
    assert values == {"eval/score": 0.5, "eval/score_stderr": pytest.approx((1 / 3) ** 0.5 / 2), "eval/one": 0.5}

"""The output of `check` is an experiment again."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.embedded import EXPERIMENT as DEMO
from orchestrator.spec import load_spec

ENDLESS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
ENDED = ENDLESS.replace("\n", "{{ eos_token }}")
CLOSED_EARLY = ENDED.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{%- endgeneration %}")
REFUSING = ENDLESS.replace("{% for", "{{ raise_exception('needs a system turn') }}{% for")


@pytest.mark.parametrize(
    ("template", "overrides", "refused"),
    [
        (ENDLESS, [], True),
        (ENDLESS, ["data.require_stop=false"], False),
        (ENDLESS, ["base.eos_token=;"], False),  # which the template may write
        (ENDED, [], False),
        (CLOSED_EARLY, ["data.loss_on=assistant"], True),
        (CLOSED_EARLY, ["data.loss_on=completion"], False),
        (REFUSING, [], False),  # known only when its rows are rendered
    ],
)
def test_a_template_that_certainly_writes_no_stop_token_is_refused(
    template: str, overrides: list[str], refused: bool, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(template)
    (tmp_path / "rows.jsonl").write_text("")
    file = tmp_path / "one.yaml"
    file.write_text(
        "base: {model: embedded}\ndata: {source: rows.jsonl, format: messages, chat_template: own.jinja}\n"
        "training: {steps: 2}\nsearch: {algorithm: random, num_trials: 1}\n"
    )
    printed = CliRunner().invoke(app, ["check", str(file), *(word for each in overrides for word in ("--set", each))])
    assert ("no row ends with a stop token" in str(printed.exception)) is refused, printed.output
    assert (printed.exit_code != 0) is refused


@pytest.mark.parametrize(
    "overrides",
    [
        ["search.num_trials=4"],
        ["search.algorithm=grid", "search.num_trials=null", "search.space={lora.rank: {grid: [4, 8]}}"],
    ],
)
def test_the_printed_experiment_is_accepted_and_equal(overrides: list[str], tmp_path: Path) -> None:
    options = [word for each in overrides for word in ("--set", each)]
    printed = CliRunner().invoke(app, ["check", str(DEMO), *options])
    assert printed.exit_code == 0, printed.output
    again = tmp_path / "again.yaml"
    again.write_text(printed.stdout)
    assert load_spec(again, []).search.total_trials == load_spec(DEMO, overrides).search.total_trials


@pytest.mark.parametrize("returned", ["[float(a == r) for a, r in zip(answers, references)]", "answers"])
def test_a_metric_of_ones_own_is_tried_and_printed_as_it_is_written(returned: str, tmp_path: Path) -> None:
    own, again = tmp_path / "own.py", tmp_path / "again.yaml"
    own.write_text(
        f"print('loaded')\ndef score(prompts, answers, references):\n    print('called')\n    return {returned}\n"
    )
    overrides = [f"evaluation.metrics=[exact_match, {own}:score]", "search.metric=eval/score"]
    options = [word for each in overrides for word in ("--set", each)]
    printed = CliRunner().invoke(app, ["check", str(DEMO), *options])
    if returned == "answers":
        assert "score of" in str(printed.exception)
        assert "not a finite number (tried with its reference as the answer)" in str(printed.exception)
    else:
        assert printed.exit_code == 0, printed.output
        again.write_text(printed.stdout)
        assert load_spec(again).evaluation == load_spec(DEMO, overrides).evaluation

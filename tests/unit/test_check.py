"""What `check` prints is an experiment again."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
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
        (ENDLESS, ["base.eos_token=;"], False),  # which may be what the template writes
        (ENDED, [], False),
        (CLOSED_EARLY, ["data.loss_on=assistant"], True),
        (CLOSED_EARLY, ["data.loss_on=completion"], False),
        (REFUSING, [], False),  # only its rows tell
    ],
)
def test_a_template_that_surely_writes_no_end_is_told(
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
def test_what_is_printed_is_accepted_and_says_the_same(overrides: list[str], tmp_path: Path) -> None:
    options = [word for each in overrides for word in ("--set", each)]
    printed = CliRunner().invoke(app, ["check", "experiments/demo.yaml", *options])
    assert printed.exit_code == 0, printed.output
    again = tmp_path / "again.yaml"
    again.write_text(printed.stdout)
    assert load_spec(again, []).search.total_trials == load_spec("experiments/demo.yaml", overrides).search.total_trials

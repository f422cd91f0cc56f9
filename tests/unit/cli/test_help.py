"""The help pages in a terminal of 80 columns: the application's and those of all commands."""

import re

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]

GROUPS = [group.name for group in app.registered_groups if group.name]
PRIORS = ["add", "list", "remove"]


def help_page(*command: str) -> str:
    """Return a help page as a terminal of 80 columns shows it."""
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": ""})
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_line_is_cut_or_longer_than_80_columns(command: str) -> None:
    usage, *lines = help_page(*([command] if command else [])).splitlines()
    assert usage.startswith("Usage: ")  # it may end with an argument that can be repeated
    assert len(lines) > 5
    assert [line for line in lines if len(line) > 80 or line.rstrip().endswith(("...", "…"))] == []


def test_every_command_has_a_whole_sentence_as_its_summary() -> None:
    listed = help_page().partition("Commands:\n")[2].partition("\n\n")[0]
    summaries = dict(re.findall(r"^  ([\w-]+) +(.*)$", listed, flags=re.MULTILINE))
    assert list(summaries) == [*COMMANDS, *GROUPS]  # a summary on two lines would leave a line that is no command
    assert len(listed.splitlines()) == len(COMMANDS) + len(GROUPS)
    assert [summary for summary in summaries.values() if not re.fullmatch(r"[A-Z].*[^.]\.", summary)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_options_name_their_values_and_the_example_is_on_one_line(command: str) -> None:
    page = help_page(command)
    options = page.partition("\nOptions:\n")[2]
    assert re.findall(r"^ +--[\w-]+ <.*", options, flags=re.MULTILINE) == []  # such as <int range> or <list[str]>
    assert page.rstrip().splitlines()[-1].startswith(f"  Example: orchestrator {command}")


@pytest.mark.parametrize("verb", PRIORS)
def test_the_verbs_of_priors_have_an_example_on_one_line(verb: str) -> None:
    page = help_page("priors", verb)
    assert [line for line in page.splitlines() if len(line) > 80] == []
    assert page.rstrip().splitlines()[-1].startswith(f"  Example: orchestrator priors {verb}")

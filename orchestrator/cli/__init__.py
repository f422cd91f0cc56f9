"""The command line: verbs over the rooms below."""

import sys

from orchestrator.cli import train, use  # noqa: F401 (they hang their verbs on the application)
from orchestrator.cli.frame import app
from orchestrator.errors import OrchestratorError
from orchestrator.signals import leave_dead_terminal


def main() -> None:
    """Run a command and exit with one of the codes that `orchestrator.errors` lists."""
    try:
        app()  # its own usage errors leave with 2, Ctrl-C with 130
    except OrchestratorError as error:
        leave_dead_terminal()  # after SIGHUP
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

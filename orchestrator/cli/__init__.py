"""The command line. Each command is a thin layer over the packages below."""

import sys

from orchestrator.imports import importing

with importing():
    from orchestrator.cli import train  # noqa: F401 (its import registers commands, in the order of the help)

    # isort: split
    from orchestrator.cli import audit, clean, look, plan, priors, pull, steer, use, write_report  # noqa: F401

    # isort: split
    from orchestrator.cli.frame import app
    from orchestrator.errors import OrchestratorError
    from orchestrator.signals import leave_dead_terminal


def main() -> None:
    """Run a command and exit with one of the codes listed in `orchestrator.errors`."""
    try:
        app()  # exits with 2 on a usage error and with 130 on Ctrl-C
    except OrchestratorError as error:
        from orchestrator.tracking.secrets import hide_secrets

        leave_dead_terminal()  # after SIGHUP
        print(f"error: {hide_secrets(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:  # a fault of ours or of a library: its traceback, without passwords and keys
        from orchestrator.tracking.secrets import traceback_of

        print(traceback_of(error), file=sys.stderr, end="")
        sys.exit(1)

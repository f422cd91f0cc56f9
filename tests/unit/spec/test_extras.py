import sys

import pytest

from orchestrator.errors import RequestError
from orchestrator.spec.extras import require_package


def test_what_is_there_is_not_imported() -> None:
    require_package("this", "a poem", "poems")
    assert "this" not in sys.modules


def test_what_is_missing_is_said_with_its_install_line() -> None:
    with pytest.raises(RequestError, match="metric mauve needs the package no_such_package") as told:
        require_package("no_such_package", "metric mauve", "metrics")
    assert told.value.remedy == "pip install 'qlora-orchestrator[metrics]'"

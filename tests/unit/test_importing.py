"""Heavy imports leave out what nobody calls, and the collector as it was."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from orchestrator.imports import importing

WORKER = """
import sys
from orchestrator.sweep.worker import _import_libraries
_import_libraries()
assert "orchestrator.training.host" in sys.modules
print("torch._inductor.compile_fx" in sys.modules)
"""


@pytest.fixture
def collector() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_rests_and_is_as_before(is_on: bool) -> None:
    (gc.enable if is_on else gc.disable)()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled() is is_on
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled() is is_on


@pytest.mark.parametrize(("asked", "is_there"), [(None, False), ("0", True)])
def test_a_worker_imports_no_compiler_unless_asked(asked: str | None, is_there: bool) -> None:
    without = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment = without if asked is None else without | {"TORCHDYNAMO_DISABLE": asked}
    done = subprocess.run([sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(is_there)

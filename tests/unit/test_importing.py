"""Heavy imports skip unused packages and leave the garbage collector as it was."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from orchestrator.imports import begin, importing

WORKER = """
import sys
from orchestrator.sweep.workers.worker import _import_libraries
_import_libraries()
assert "orchestrator.training.worker.runtime" in sys.modules
print("torch._inductor.compile_fx" in sys.modules)
"""
TRAINER = """
from orchestrator.sweep.workers.worker import _import_libraries
_import_libraries()
import sys
from orchestrator.training.engines.sft import import_trainer
import_trainer()
from transformers.integrations import is_wandb_available
from accelerate.utils import is_peft_model
from peft import LoraConfig, get_peft_model
from torch.nn import Linear, Sequential
bare = Sequential(Linear(2, 2))
print(is_wandb_available(), any(name.startswith("wandb.") for name in sys.modules), is_peft_model(bare))
print(is_peft_model(get_peft_model(bare, LoraConfig(target_modules=["0"]))))
from accelerate.utils import imports, other
print(imports._is_package_available.cache_info().hits > 0, other.has_compiled_regions(bare))
"""
END = """
import time
from orchestrator.imports import begin
begin(lambda: (time.sleep(1), print("done"))[1])
"""
RACE = """
import sys
from threading import Thread
from orchestrator.training.engines.sft import build_trainer, import_trainer
thread = Thread(target=import_trainer)
thread.start()
while "trl" not in sys.modules:
    pass
try:
    build_trainer(*[None] * 5)
except AttributeError as error:  # the import is complete, and there is no configuration
    print(error)
thread.join()
"""


@pytest.fixture
def collector() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_is_off_during_imports_and_restored_after_them(is_on: bool) -> None:
    (gc.enable if is_on else gc.disable)()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled() is is_on
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled() is is_on


@pytest.mark.parametrize(("setting", "is_imported"), [(None, False), ("0", True)])
def test_a_worker_imports_the_compiler_only_if_the_environment_says_so(setting: str | None, is_imported: bool) -> None:
    without = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment = without if setting is None else without | {"TORCHDYNAMO_DISABLE": setting}
    done = subprocess.run([sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(is_imported)


def test_a_worker_imports_trainers_without_wandb_and_recognizes_peft_models() -> None:
    pytest.importorskip("wandb")
    done = subprocess.run([sys.executable, "-c", TRAINER], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-6:] == ["False", "False", "False", "True", "True", "False"]


def test_imports_run_in_their_own_thread() -> None:
    names: list[str] = []
    thread = begin(lambda: names.append(threading.current_thread().name))
    thread.join()
    assert names == ["imports"]


def test_a_process_does_not_end_during_its_imports() -> None:
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"


def test_building_a_trainer_waits_for_the_thread_that_imports_it() -> None:
    """A worker's thread may build a trainer for a separate trial while another thread still imports it."""
    done = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "'NoneType' object has no attribute 'training'"

"""With `training.reproducible`, a trial on a GPU has the same bits alone, with other trials, and after a resume."""

from pathlib import Path

import pytest
from bits import WATCHED, Setting
from shared_engine import open_inputs
from tiny import DEMO, TINY, Witness

from orchestrator.errors import TrialError
from orchestrator.record import SweepPaths
from orchestrator.spec import load_spec
from orchestrator.training.local import run_local_trial

pytestmark = pytest.mark.gpu

REPRODUCIBLE = ["base.compute_dtype=bfloat16", "training.reproducible=true"]


@pytest.fixture(scope="module", params=["adamw_torch_fused", "adamw_8bit"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder, optimizer = tmp_path_factory.mktemp("alone"), f"training.optimizer={request.param}"
    return Setting(open_inputs(*REPRODUCIBLE), folder, *REPRODUCIBLE, optimizer, gpus=1)


def test_a_trial_with_others_has_the_same_bits_as_alone(setting: Setting, tmp_path: Path) -> None:
    setting.assert_same_beside_others(tmp_path)


@pytest.mark.parametrize("name", WATCHED)
def test_a_resumed_trial_has_the_same_bits_as_an_uninterrupted_one(setting: Setting, tmp_path: Path, name: str) -> None:
    setting.assert_same_resumed(tmp_path, name)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.engine=trl", "but training.engine is trl"),
        ("lora.dora=true", "which does not support lora.dora"),
    ],
)
def test_a_trial_that_cannot_be_reproducible_is_refused(tmp_path: Path, override: str, reason: str) -> None:
    spec = load_spec(DEMO, [*TINY, *REPRODUCIBLE, override])
    with pytest.raises(TrialError, match=reason):
        run_local_trial(spec, SweepPaths(tmp_path / "sweep"), Witness())

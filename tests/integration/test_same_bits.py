"""On a CPU, a trial's results are the same bits alone, beside other trials, and after a resume."""

from pathlib import Path

import pytest
from bits import WATCHED, Setting
from shared_engine import open_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    layers = "lora.layers_to_transform=[0, 1, 3]"
    return Setting(open_inputs(), tmp_path_factory.mktemp("alone"), layers)


def test_trial_beside_others_has_the_same_bits_as_alone(setting: Setting, tmp_path: Path) -> None:
    setting.assert_same_beside_others(tmp_path)


@pytest.mark.parametrize("name", WATCHED)
def test_resumed_trial_has_the_same_bits_as_an_uninterrupted_one(setting: Setting, tmp_path: Path, name: str) -> None:
    setting.assert_same_resumed(tmp_path, name)

"""On a CPU a trial has the same bits alone, beside any others, evaluated at any time, and resumed."""

from pathlib import Path

import pytest
from bits import WATCHED, Setting
from packed import open_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    layers = "lora.layers_to_transform=[0, 1, 3]"
    return Setting(open_inputs(), tmp_path_factory.mktemp("alone"), layers)


def test_a_trial_beside_others_has_the_bits_that_it_has_alone(setting: Setting, tmp_path: Path) -> None:
    setting.assert_same_beside_others(tmp_path)


@pytest.mark.parametrize("name", WATCHED)
def test_a_resumed_trial_has_the_bits_of_one_that_was_never_interrupted(
    setting: Setting, tmp_path: Path, name: str
) -> None:
    setting.assert_same_resumed(tmp_path, name)

import json
from typing import Any

import numpy as np

from orchestrator.spec import parse_spec
from orchestrator.sweep.tune_trial import plain_values


def test_sampled_values_become_json_types(document: dict[str, Any]) -> None:
    sampled = {
        "lora.rank": np.int64(8),
        "lora.dropout": np.float64(0.1),
        "training.learning_rate": np.float32(0.5),
        "training.group_by_length": np.bool_(True),
        "training.schedule": "linear",
        "lora.target_modules": ["q_proj"],
        "training.epochs": None,
    }
    plain = plain_values(sampled)
    assert [type(value) for value in plain.values()] == [int, float, float, bool, str, list, type(None)]
    assert plain == sampled
    config = parse_spec(document).trial_config(plain)
    assert json.loads(config.model_dump_json())["varied"] == plain
    assert (config.lora.rank, config.lora.dropout, config.training.group_by_length) == (8, 0.1, True)

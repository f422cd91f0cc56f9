"""Where a search begins, by the base and the experiment."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.rate_prior import rate_of, with_prior
from orchestrator.spec import parse_spec
from orchestrator.spec.search import RATE

Document = dict[str, Any]


@pytest.mark.parametrize(
    ("width", "family", "rate"),
    [(2000, "llama", 5e-4), (4096, "llama", 2.86e-4), (4096, "qwen3", 4.73e-4), (4096, "gemma2", 3.67e-4)],
)
def test_the_rate_falls_with_the_width_as_in_the_family(width: int, family: str, rate: float) -> None:
    assert rate_of(width, family) == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        ({"model_type": "llama", "hidden_size": 4096}, 2.86e-4),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", "hidden_size": 4096}}, 4.73e-4),
        ({"model_type": "gpt2", "n_embd": 768}, 7.55e-4),
        ({"model_type": "unknown"}, 5e-4),
    ],
)
def test_the_width_is_read_from_the_bases_configuration(
    document: Document, tmp_path: Path, config: Document, rate: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    document["base"] = {"model": str(tmp_path)}
    spec, said = with_prior(parse_spec(document | {"search": {"num_trials": 4}}))
    assert spec.search.prior[RATE] == pytest.approx(rate, rel=0.01)
    assert len(said) == 1
    assert said[0].startswith("search: learning rates begin around")


def test_the_experiments_own_values_go_before(document: Document) -> None:
    space = {
        RATE: {"choice": [1e-4, 1e-3, 1e-2]},
        "lora.rank": {"choice": [4, 32, 8]},
        "lora.dropout": {"choice": [0.0, 0.1]},
        "training.schedule": {"choice": ["linear", "cosine"]},
    }
    document |= {"training": {"learning_rate": 2e-3}, "lora": {"dropout": 0.09}, "search": {"space": space}}
    spec, said = with_prior(parse_spec(document))
    assert spec.search.prior == {RATE: 1e-3, "lora.rank": 32, "lora.dropout": 0.1, "training.schedule": "cosine"}
    assert "the experiment's own training.learning_rate" in said[0]
    assert with_prior(spec) == (spec, []), "a recorded sweep keeps its prior"


def test_only_auto_has_a_prior(document: Document) -> None:
    spec = parse_spec(document | {"search": {"algorithm": "random", "space": {RATE: {"loguniform": [1e-5, 1e-2]}}}})
    assert with_prior(spec) == (spec, [])

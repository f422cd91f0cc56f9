"""Tune's searchers, as the experiment asks for them."""

import pytest

from orchestrator.spec import load_spec
from orchestrator.sweep.search import make_searcher


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_resumed_search_keeps_to_the_slots_of_today(algorithm: str) -> None:
    search = load_spec("experiments/demo.yaml", [f"search.algorithm={algorithm}"]).search
    before, today = make_searcher(search, 3), make_searcher(search, 5)
    before.live_trials = {"a"}
    today.set_state(before.get_state())
    assert today.max_concurrent == 5
    assert today.live_trials == {"a"}

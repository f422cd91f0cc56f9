"""What a search is where the experiment does not say: its algorithm, and the space of algorithm `auto`."""

from typing import Any

DEFAULT_SPACE: dict[str, dict[str, list[Any]]] = {
    "training.learning_rate": {"loguniform": [2e-5, 1e-2]},
    "lora.rank": {"choice": [8, 16, 32, 64]},
    "lora.alpha": {"choice": [16, 32, 64]},
    "lora.dropout": {"choice": [0.0, 0.05, 0.1]},
    "training.batch_size": {"choice": [4, 8, 16]},
}
"""Field -> axis. `docs/choosing.md` gives the reason for each."""
BUDGET_TRIALS = 64
"""Trials of a search that has a budget and neither a space nor a number of trials: the budget ends it."""

_DRAWS_AT_START = ("hyperband", "pbt", "pb2")
"""Schedulers whose trials all exist before one has reported."""


def complete_search(document: dict[str, Any]) -> dict[str, Any]:
    """Return an experiment with the algorithm and the space that its search section leaves open.

    Sections that are not written as they should be stay as they are: validation reports them.

    Raises:
        ValueError: several trials are asked for, and the experiment fixes every field of the default space.
    """
    search, scheduler = document.get("search"), document.get("scheduler")
    search = {} if search is None else search
    if not isinstance(search, dict):
        return document
    kind = scheduler.get("kind") if isinstance(scheduler, dict) else getattr(scheduler, "kind", None)
    if "algorithm" not in search and kind in _DRAWS_AT_START:
        return document | {"search": search | {"algorithm": "random"}}
    if search.get("algorithm", "auto") != "auto" or search.get("space") or not _asks_for_trials(search):
        return document
    space = {path: axis for path, axis in DEFAULT_SPACE.items() if not _is_fixed(document, search, path)}
    if not space and search.get("num_trials"):
        raise ValueError(
            f"search: {search['num_trials']} trials are asked for and no space is given, but the experiment fixes all "
            f"fields of the default space ({', '.join(DEFAULT_SPACE)}); give search.space, or leave out their values"
        )
    if not space:
        return document
    trials = {} if search.get("num_trials") else {"num_trials": BUDGET_TRIALS}
    return document | {"search": search | {"space": space} | trials}


def _asks_for_trials(search: dict[str, Any]) -> bool:
    """Whether a search asks for several trials, or for as many as its budget allows."""
    number, budget = search.get("num_trials"), search.get("budget")
    has_limit = isinstance(budget, dict) and any(limit is not None for limit in budget.values())
    return (isinstance(number, int) and number > 1) or (number is None and has_limit)


def _is_fixed(document: dict[str, Any], search: dict[str, Any], path: str) -> bool:
    """Whether the experiment gives a field a value, or ties it.

    The batch size is fixed where trials have a number of steps too: a larger batch would win by more tokens.
    """
    section, _, field = path.partition(".")
    written = document.get(section)
    tied = search.get("tied")
    if isinstance(tied, dict) and path in tied:
        return True
    if not isinstance(written, dict):
        return False
    return field in written or (field == "batch_size" and written.get("steps") is not None)

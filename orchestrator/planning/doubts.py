"""What is valid in an experiment, but probably not meant. `check` and `plan` warn of it. Imports no ML library."""

import glob
from collections.abc import Iterator
from pathlib import Path

from orchestrator.base_folder import config_document, hub_id
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections.scheduler import NoScheduler

_RANDOM_STARTS = {"auto": 3, "optuna": 10, "hyperopt": 20}
"""Searcher -> trials before its model proposes points, unless `search.startup_trials` says otherwise."""


def doubts_of(spec: SweepSpec) -> list[str]:
    """Return warnings about paths, search, scheduler and ranks.

    Args:
        spec: the experiment; its fields are valid.
    """
    return [*_missing_paths(spec), *_idle_search(spec), *_idle_scheduler(spec), *_large_ranks(spec)]


def _missing_paths(spec: SweepSpec) -> Iterator[str]:
    bases = dict.fromkeys(config.base.model for config in spec.samples())
    for model in bases:
        if Path(model).is_absolute() and not (Path(model) / "config.json").is_file():
            yield f"base.model {model}: there is no model in this folder (no config.json); give the path of one"
    parts = {"data.source": spec.data.sources, "data.held_out.source": spec.data.held_out.sources}
    if spec.data.test:
        parts["data.test.source"] = spec.data.test.sources
    for field, sources in parts.items():
        for source in sources:
            path = source.source
            if source.is_local and path != "embedded" and not Path(path).exists() and not glob.has_magic(path):
                yield f"{field} {path}: there is no such file or folder; give the path of one"


def _idle_search(spec: SweepSpec) -> Iterator[str]:
    search, total = spec.search, spec.search.total_trials
    start = search.startup_trials or _RANDOM_STARTS.get(search.algorithm, 0)
    if search.algorithm == "bohb":
        start = search.startup_trials or len(search.space) + 1
    if search.sampler == "cmaes":
        start = search.startup_trials or 1
    if search.learns and total > 1 and start >= total and search.algorithm != "auto":
        yield (
            f"search.algorithm {search.algorithm}: its first {start} trials are drawn at random, and there are {total} "
            "in all, so that its model never chooses; set search.startup_trials lower, give more trials, or use auto"
        )


def _idle_scheduler(spec: SweepSpec) -> Iterator[str]:
    kind = spec.scheduler.kind
    if not isinstance(spec.scheduler, NoScheduler) and spec.search.total_trials == 1:
        yield f"scheduler.kind {kind}: there is one trial, and no other to compare it with; leave it out"


def _large_ranks(spec: SweepSpec) -> Iterator[str]:
    """Yield a warning if an adapter has as many parameters as the layers that it changes.

    A layer of H x H weights has H^2, an adapter of rank r on it 2 r H: they are equal at r = H / 2.
    """
    for base in dict.fromkeys(config.base for config in spec.samples()):
        document = config_document(base)
        hidden = (document.get("text_config") or document).get("hidden_size")
        ranks = [config.lora.rank for config in spec.samples() if config.base == base]
        if isinstance(hidden, int) and max(ranks) >= hidden / 2:
            name = base.model if hub_id(base.model) is None else hub_id(base.model)
            yield (
                f"lora.rank {max(ranks)}: base {name} is {hidden} features wide, so that the adapter of a square layer "
                f"has no fewer parameters than the layer; give at most {hidden // 4}"
            )

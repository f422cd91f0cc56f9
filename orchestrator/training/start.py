"""Write a new sweep to disk, or its rows again. Bad rows are reported before anything is written."""

import errno
import shutil
from collections.abc import Callable, Sequence

from orchestrator.adapters.generate import texts_of
from orchestrator.adapters.row_metrics import try_own_metrics
from orchestrator.base import load_tokenizer
from orchestrator.data import prepare, save
from orchestrator.errors import DataError, RequestError
from orchestrator.record import ExperimentSource, SweepInfo, SweepPaths, SweepRecord, repair, write_info
from orchestrator.record.files import building_beside, publish
from orchestrator.record.manifest import folder_fault
from orchestrator.record.models import PriorSweep
from orchestrator.record.new_sweep import already_exists, describe_sweep
from orchestrator.spec import SweepSpec
from orchestrator.spec.scheduler_effect import require_scheduler_effect
from orchestrator.training.engines.check_targets import check_targets


def repair_sweep(record: SweepRecord, say: Callable[[str], None]) -> None:
    """Repair the damaged records of a sweep, and make its rows anew if they are missing or damaged.

    Args:
        record: the sweep; the caller is its only driver.
        say: called with a message about each damage.

    Raises:
        DataError: the sources no longer give the same rows.
    """
    for damage in repair(record):
        say(f"damaged: {damage}")
    _restore_rows(record, say)


def _restore_rows(record: SweepRecord, say: Callable[[str], None]) -> None:
    """Make the rows of a sweep anew from their sources, if their files are missing or damaged.

    Args:
        record: the sweep; the caller is its only driver.
        say: called with a message if they are.

    Raises:
        DataError: the sources no longer give the same rows.
    """
    paths, info = record.paths, record.info
    fault = folder_fault(paths.data)
    if fault is None:
        return
    say(f"damaged: {paths.data}: {fault}; the rows are made anew from their sources")
    prepared = prepare(info.spec.data, info.spec.base)
    if prepared.fingerprint != info.data_fingerprint:
        raise DataError(
            f"{paths.data}: {fault}, and the sources of the rows have changed since the sweep began",
            "Restore the sources or this folder from a backup; trials on other rows cannot be compared with these.",
        )
    shutil.rmtree(paths.data, ignore_errors=True)
    save(prepared, paths.data, siblings=paths.root.parent)


def start_sweep(
    spec: SweepSpec,
    paths: SweepPaths,
    source: ExperimentSource | None = None,
    is_single_trial: bool = False,
    prior_sweeps: Sequence[PriorSweep] = (),
) -> SweepInfo:
    """Tokenize the data, then write the data and the sweep's record. The folder appears with both, or not at all.

    Args:
        spec: the experiment.
        paths: a folder that does not exist yet, or the empty one from `record.new_sweep.claim_folder`.
        source: where the experiment was read from. A resume compares itself with it.
        is_single_trial: whether the sweep is one trial of the experiment's own values, without Ray.
        prior_sweeps: what the search takes from earlier sweeps.

    Raises:
        RequestError: the base's layers, its tokenizer or the data do not match the experiment, a held-out prompt has no
            token, a metric of the user's own fails on the first held-out row, the scheduler would change nothing with
            so many rows, another sweep has taken the folder, or it cannot be written. Nothing is left behind.
    """
    check_targets(spec)
    prepared = prepare(spec.data, spec.base)
    if not is_single_trial:
        require_scheduler_effect(spec, prepared.num_sequences or prepared.num_train)
    if spec.evaluation.metrics and not all(prompt.ids for prompt in prepared.prompts[: spec.evaluation.rows]):
        raise RequestError(
            "evaluation.metrics: a held-out row has no token before its answer, so that nothing can be asked",
            "Write text before the answer in data.template, or leave evaluation.metrics out.",
        )
    if spec.evaluation.own:
        tokenizer, first = load_tokenizer(spec.base, spec.data.chat_template), prepared.prompts[0]
        try_own_metrics(spec.evaluation.own, texts_of(tokenizer, [first.ids])[0], first.answer)
    info = describe_sweep(
        spec,
        paths,
        source,
        is_single_trial=is_single_trial,
        data_fingerprint=prepared.fingerprint,
        num_train=prepared.num_train,
        num_held_out=len(prepared.held_out),
        num_test=0 if prepared.test is None else len(prepared.test),
        num_truncated=prepared.num_truncated,
        num_dropped=prepared.num_dropped,
        num_shared=prepared.num_shared,
        num_sequences=prepared.num_sequences,
        sources=prepared.sources,
        bad_rows=prepared.bad_rows,
        prior_sweeps=prior_sweeps,
    )
    try:
        with building_beside(paths.root) as building:
            inside = SweepPaths(building)
            save(prepared, inside.data, siblings=paths.root.parent)
            for metric in spec.evaluation.own:
                inside.metrics.mkdir(exist_ok=True)
                (inside.metrics / f"{metric.function}.py").write_text(metric.source, encoding="utf-8")
            write_info(inside, info)
            publish(building, paths.root)  # replaces an empty folder, but no other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise already_exists(paths.root) from error
        raise RequestError(f"{paths.root}: cannot be written: {error}", "Give --output another folder.") from error
    return info

"""Run a sweep from its first trial to its last, or resume one after an interruption. Runs in the driver.

Ray Tune takes seconds to import. It is imported inside functions, after the workers have been started: their imports
take longer.
"""

import shutil
from collections.abc import Sequence

from orchestrator.base import import_tokenizers
from orchestrator.base_folder import as_stored
from orchestrator.cluster import connection, require_shared_folder
from orchestrator.data import PreparedData, load
from orchestrator.errors import SweepError
from orchestrator.imports import begin
from orchestrator.priors.evidence import evidence_from, with_evidence
from orchestrator.priors.library import with_library
from orchestrator.rate_prior import with_prior
from orchestrator.record import ExperimentSource, SweepPaths, SweepRecord, TrialState, read_sweep
from orchestrator.record.extend import save_extension
from orchestrator.record.rows import notes_on_rows
from orchestrator.remote.mirror import mirroring
from orchestrator.signals import deferred_signals, signal_name
from orchestrator.spec import SweepSpec
from orchestrator.spec.optional_packages import require_extras
from orchestrator.spec.scheduler_effect import require_scheduler_effect
from orchestrator.spec.sections.scheduler import ForecastScheduler
from orchestrator.storage import storage_fault
from orchestrator.sweep.conclusion import conclude, ended, raise_interrupted
from orchestrator.sweep.follow import Watch, follow
from orchestrator.sweep.leftovers import held
from orchestrator.sweep.signature import owner_key
from orchestrator.sweep.snapshot import require_signed, trust_snapshot
from orchestrator.sweep.tuner import Fault, Say, UnfitReason, make_tuner
from orchestrator.sweep.workers.fleet import Fleet, compiling_early, start_fleet
from orchestrator.sweep.workers.worker_client import Workers
from orchestrator.tracking.catch_up import catch_up
from orchestrator.tracking.servers import require_servers, server_faults
from orchestrator.training.start import repair_sweep, start_sweep
from orchestrator.words import counted


def run_sweep(
    spec: SweepSpec,
    paths: SweepPaths,
    watch: Watch,
    address: str | None = None,
    say: Say = lambda _: None,
    source: ExperimentSource | None = None,
    warm_from: Sequence[SweepRecord] = (),
    doing: Say = lambda _: None,
) -> SweepRecord:
    """Run all trials of an experiment.

    Args:
        spec: the experiment.
        paths: a folder that does not exist yet, or the empty one from `record.new_sweep.claim_folder`.
        watch: called with all trials whenever something changes.
        address: address of a Ray cluster; None starts Ray on this machine.
        say: called with messages about the workers and about what the sweep waits for.
        source: the file that the experiment was read from.
        warm_from: earlier sweeps whose finished trials are evidence for the search. What is taken from them is in the
            record.
        doing: called with the name of each piece of work that takes seconds, such as `starting Ray`.

    Raises:
        RequestError: base or data do not match the experiment, an earlier sweep or the library of priors does not fit,
            a package is missing, the scheduler would change nothing, a tracker's server does not accept the sweep, or
            there is no key to sign its state with; nothing is written.
        ClusterError: Ray cannot be reached, or its nodes do not share the folder.
        SweepError: no trial finished, or Ray Tune gave up.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP arrived. Trials have written a checkpoint of their last step.
        StorageError: the disk is full or fails; or the object store of the output lacks files at the end.
    """
    require_extras(spec)
    require_scheduler_effect(spec)
    require_servers(spec.tracking)
    owner_key()
    prior_sweeps = evidence_from(spec, warm_from)
    for change in (with_library, lambda spec: with_evidence(spec, prior_sweeps), with_prior, as_stored):
        spec, notes = change(spec)
        for note in notes:
            say(f"note: {note}")
    doing("starting Ray and the workers")
    imports = begin(import_tokenizers)  # meanwhile Ray starts, which takes about as long
    with compiling_early(spec, address), connection(address), start_fleet(spec, address) as fleet:
        require_shared_folder(paths.root.parent)
        imports.join()
        doing("reading and tokenizing the data")
        info = start_sweep(spec, paths, source, prior_sweeps=prior_sweeps)
        for note in notes_on_rows(info):
            say(note)
        with held(paths), mirroring(paths, say):
            return _drive(SweepRecord(paths, info), fleet, watch, say, doing)


def resume_sweep(
    record: SweepRecord,
    watch: Watch,
    address: str | None = None,
    say: Say = lambda _: None,
    doing: Say = lambda _: None,
    trust_state: bool = False,
) -> SweepRecord:
    """Resume a sweep whose driver died or was interrupted. Finished trials do not run again.

    Changes that `record.extend.extend_sweep` has made to the record are written before the first trial. A tracker's
    server that does not answer is only a warning: the sweep has begun, and its trackers can catch up later.

    Args:
        record: the sweep.
        watch, address, say, doing: as in `run_sweep`.
        trust_state: load Tune's state whoever has signed it. It can run code.

    Raises:
        RecordError: the state of Tune is not signed with the owner's key, and is not trusted.
        OrchestratorError: the other errors of `run_sweep`.
    """
    require_extras(record.info.spec)
    spec = record.info.spec
    for fault in server_faults(spec.tracking):
        say(f"warning: {fault.message}")
    with held(record.paths):
        for paths in (record.paths, SweepPaths(record.paths.repeats)):
            _require_state(paths, trust_state, say)
        doing("starting Ray and the workers")
        with compiling_early(spec, address), connection(address), start_fleet(spec, address) as fleet:
            require_shared_folder(record.paths.root)
            repair_sweep(record, say)
            save_extension(record)
            with mirroring(record.paths, say):
                return _drive(record, fleet, watch, say, doing)


def _drive(record: SweepRecord, fleet: Fleet, watch: Watch, say: Say, doing: Say) -> SweepRecord:
    """Run the trials of the search, then the finalists again with other seeds, if the experiment asks for that."""
    spec = record.info.spec
    doing("loading the base in the workers")
    data = load(record.paths.data, in_memory=True)
    workers, num_slots, choice = fleet.open(data, record.paths, say)
    say(choice)
    doing("starting the search")
    max_concurrent = min(num_slots, spec.resources.max_concurrent or num_slots)
    _run_trials(
        record,
        workers,
        max_concurrent,
        watch,
        say,
        home=record.paths,
        worker_fault=fleet.fault,
        unfit_reason=_unfit_reason(record, fleet, workers, data),
    )
    record = read_sweep(record.paths.root)
    if spec.search.repeats > 1:
        if record.budget_spent():
            say("search.repeats: the finalists do not run again, because the budget is spent")
        else:
            from orchestrator.sweep.repeats import begin_repeats

            again, before = begin_repeats(record), record.trials()
            if again is not None:
                say(f"the finalists run again with other seeds: {counted(again.info.num_trials, 'trial')}")
                _run_trials(
                    again,
                    workers,
                    max_concurrent,
                    lambda found: watch(before + found),
                    say,
                    home=record.paths,
                    worker_fault=fleet.fault,
                )
    if spec.data.test is not None:
        from orchestrator.sweep.winner import measure_winner

        doing("measuring the winner on the test rows")
        fleet.end()  # the winner's process gets its GPU
        measure_winner(record, *fleet.resources)
    return record


def _require_state(paths: SweepPaths, is_trusted: bool, say: Say) -> None:
    """Check that the owner has signed the state of a sweep, or sign it if the user trusts it."""
    if is_trusted:
        trust_snapshot(paths)
    else:
        require_signed(paths, say)


def _unfit_reason(record: SweepRecord, fleet: Fleet, workers: Workers, data: PreparedData) -> UnfitReason | None:
    """Return a function that says why a trial cannot fit into the workers' GPUs; None where no trial is dropped."""
    if not record.info.spec.search.skip_unfit or (memory := fleet.gpu_memory(workers)) is None:
        return None
    from orchestrator.planning.fit import FitCheck

    return FitCheck(record.info.spec, data, memory)


def finish_audit(
    record: SweepRecord,
    audit: SweepRecord,
    watch: Watch,
    address: str | None = None,
    say: Say = lambda _: None,
    trust_state: bool = False,
) -> None:
    """Run the trials of an audit that have not ended, while no other driver holds the sweep.

    Args:
        record: the sweep.
        audit: the record of `audit.begin_audit`.
        watch, address, say: as in `run_sweep`.
        trust_state: as in `resume_sweep`.

    Raises:
        The same errors as `resume_sweep`.
    """
    with held(record.paths), mirroring(record.paths, say):
        _require_state(audit.paths, trust_state, say)
        if len(ended(audit.trials())) == audit.info.num_trials:
            watch(audit.trials())
            conclude(audit, audit.paths, failures_count=True)
            return
        spec = audit.info.spec
        with compiling_early(spec, address), connection(address), start_fleet(spec, address) as fleet:
            require_shared_folder(record.paths.root)
            rows = load(audit.paths.data, in_memory=True)
            workers, num_slots, choice = fleet.open(rows, audit.paths, say)
            say(choice)
            max_concurrent = min(num_slots, spec.resources.max_concurrent or num_slots)
            _run_trials(
                audit,
                workers,
                max_concurrent,
                watch,
                say,
                home=audit.paths,
                worker_fault=fleet.fault,
                failures_count=True,
            )


def _run_trials(
    record: SweepRecord,
    workers: Workers,
    max_concurrent: int,
    watch: Watch,
    say: Say,
    home: SweepPaths,
    worker_fault: Fault,
    failures_count: bool = False,
    unfit_reason: UnfitReason | None = None,
) -> None:
    """Run all trials of a record to their end.

    Args:
        record: the sweep's record, or that of its repeats.
        workers: train the trials.
        max_concurrent: number of trials that run at a time.
        watch: called with the trials whenever something changes.
        say: called with messages.
        home: the sweep's own paths, which a resume is given.
        worker_fault: returns why the workers cannot go on.
        failures_count: see `conclude`.
        unfit_reason: see `_unfit_reason`.
    """
    from ray.tune.error import TuneError

    from orchestrator.sweep.interruption import Interruption, storage_error
    from orchestrator.sweep.results import cancel_unknown
    from orchestrator.sweep.schedulers.forecast.calibration import coverage_of
    from orchestrator.sweep.schedulers.forecast.plans import why_median

    spec = record.info.spec
    if isinstance(spec.scheduler, ForecastScheduler) and (reason := why_median(spec, record.info.num_rows)) is not None:
        say(f"note: scheduler forecast: the median rule decides, because {reason}")
    with deferred_signals(say, lambda: _checkpoints_to_write(record)) as stop:
        try:
            tuner = make_tuner(record, workers, max_concurrent, stop, worker_fault, say, unfit_reason)
            with follow(record, watch, say):
                tuner.fit()
        except Interruption:
            assert stop.signal is not None
            raise_interrupted(record, home, f"by {signal_name(stop.signal)}", 128 + stop.signal)
        except (OSError, TuneError) as error:
            if fault := storage_fault(error):
                raise storage_error(home, fault) from error
            if isinstance(error, OSError):
                raise
            raise SweepError(
                f"Ray Tune gave up: {str(error).strip().splitlines()[-1]}",
                f"All results are kept; continue with: orchestrator resume {home.root}",
            ) from error
    record = read_sweep(record.paths.root)  # people may have extended it meanwhile
    cancel_unknown(record)
    catch_up(record, say)
    if over := record.why_over():
        begun = len(record.paths.trial_ids())
        say(f"{over}: {begun} of {counted(record.info.num_trials, 'trial')} begun")
    conclude(record, home, failures_count)
    if isinstance(spec.scheduler, ForecastScheduler) and (coverage := coverage_of(record)) is not None:
        say(coverage)
    for trial_id in record.paths.trial_ids():
        shutil.rmtree(record.paths.trial(trial_id).exploit_checkpoints, ignore_errors=True)


def _checkpoints_to_write(record: SweepRecord) -> str:
    running = sum(trial.state == TrialState.RUNNING for trial in record.trials())
    return f"stopping at the next step, {counted(running, 'checkpoint')} to write"

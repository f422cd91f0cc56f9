"""Put a new sweep on disk: its data first, so that a bad row is told before anything is written."""

import tempfile
from pathlib import Path

from orchestrator.data import prepare, save
from orchestrator.errors import RequestError
from orchestrator.record import ExperimentSource, SweepInfo, SweepPaths, write_record
from orchestrator.record.start import describe_sweep
from orchestrator.spec import SweepSpec
from orchestrator.spec.effect import require_effect


def start_sweep(
    spec: SweepSpec, paths: SweepPaths, source: ExperimentSource | None = None, is_single_trial: bool = False
) -> SweepInfo:
    """Tokenize, then write the sweep's data and record.

    Args:
        spec: the experiment.
        paths: a folder that does not exist yet.
        source: where the experiment was read from, which a resume compares it with.
        is_single_trial: whether it is one trial of the experiment's own values, without Ray.

    Raises:
        RequestError: the base's tokenizer or the data are not what the experiment says, or the scheduler would change
            nothing with so many rows; nothing is written.
    """
    prepared = prepare(spec.data, spec.base)
    if not is_single_trial:
        require_effect(spec, prepared.num_sequences or prepared.num_train)
    try:
        paths.root.parent.mkdir(parents=True, exist_ok=True)
        building = SweepPaths(Path(tempfile.mkdtemp(dir=paths.root.parent, prefix=f".{paths.name}.")))
    except OSError as error:
        raise RequestError(f"{paths.root}: cannot be made: {error}") from error
    save(prepared, building.data)
    info = describe_sweep(
        spec,
        paths,
        source,
        is_single_trial=is_single_trial,
        data_fingerprint=prepared.fingerprint,
        num_train=prepared.num_train,
        num_held_out=len(prepared.held_out),
        num_truncated=prepared.num_truncated,
        num_dropped=prepared.num_dropped,
        num_shared=prepared.num_shared,
        num_sequences=prepared.num_sequences,
        sources=prepared.sources,
        bad_rows=prepared.bad_rows,
    )
    write_record(building.sweep, info)
    building.root.chmod(0o755)
    building.root.rename(paths.root)  # a sweep's folder is there with its record, or not at all
    return info

"""Put a new sweep on disk: its data first, so that a bad row is told before anything is written."""

from orchestrator.data import prepare, save
from orchestrator.record import SweepInfo, SweepPaths, write_record
from orchestrator.record.start import describe_sweep
from orchestrator.spec import SweepSpec


def start_sweep(spec: SweepSpec, paths: SweepPaths, is_single_trial: bool = False) -> SweepInfo:
    """Tokenise, then write the sweep's data and record.

    Raises:
        RequestError: the base's tokenizer or the data are not what the experiment says; nothing is written.
    """
    prepared = prepare(spec.data, spec.base)
    paths.root.mkdir(parents=True)
    save(prepared, paths.data)
    info = describe_sweep(
        spec,
        paths,
        is_single_trial=is_single_trial,
        data_fingerprint=prepared.fingerprint,
        num_train=len(prepared.train),
        num_held_out=len(prepared.held_out),
        num_truncated=prepared.num_truncated,
    )
    write_record(paths.sweep, info)
    return info

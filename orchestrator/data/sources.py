"""Read the rows of a source, each with its place, so that messages can name a bad one."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from orchestrator.data.files import read_local
from orchestrator.data.row import Row, without_fillers
from orchestrator.embedded.task import rows as embedded_rows
from orchestrator.errors import DataError
from orchestrator.spec.sections import Source


def read_rows(source: Source, seed: int = 0) -> list[Row]:
    """Return the rows of a source in its order; a stream is shuffled by `seed`.

    Raises:
        DataError: the source cannot be read, a row is invalid, or there is none.
    """
    if source.source == "embedded":
        rows: Iterator[Row] = (Row(dict(each), f"embedded:{i}") for i, each in enumerate(embedded_rows(), start=1))
    elif source.is_local:
        rows = read_local(Path(source.source), source.split, source.default_split, source.delimiter)
    else:
        rows = _read_hub(source, seed)
    found = list(islice(rows, source.max_rows))
    if not found:
        raise DataError(f"{source.source}: holds no row")
    return found


def _read_hub(source: Source, seed: int) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    split = source.used_split
    named = f"{source.source}[{split}]"
    try:
        if source.stream_buffer is not None:
            # Only the files that are read from are opened; shuffling draws the order of files too.
            stream = load_dataset(source.source, source.config, split=split, streaming=True)
            dataset, named = stream.shuffle(seed=seed, buffer_size=source.stream_buffer), f"{named} streamed"
        else:
            taken = split if source.max_rows is None else f"{split}[:{source.max_rows}]"
            dataset = load_dataset(source.source, source.config, split=taken)
        for number, values in enumerate(dataset):
            yield Row(without_fillers(values), f"{named} row {number}")
    except (
        OSError,
        ValueError,
        ConnectionError,
        RuntimeError,
        DatasetsError,
    ) as error:  # RuntimeError: huggingface_hub's offline mode
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source.source} (split {split}): cannot be loaded from the hub: {reason}",
            "Give a local file by its path, such as ./rows.jsonl, and a hub id as owner/name.",
        ) from error

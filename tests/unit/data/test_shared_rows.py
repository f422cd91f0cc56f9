"""Tokenized rows on disk: the smallest integers, and files that sweeps of one folder share."""

from multiprocessing import get_context
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets

from orchestrator.data import load, prepare, save
from orchestrator.data.prepare import PreparedData
from orchestrator.data.shared_rows import _digest, id_types
from orchestrator.spec.sections import BaseSection, DataSection

SECTION = {
    "source": "embedded",
    "format": "template",
    "template": "{question} {answer}",
    "max_rows": 60,
    "packing": True,
}


@pytest.fixture(scope="module")
def prepared() -> PreparedData:
    return prepare(DataSection.model_validate(SECTION), BaseSection(model="embedded"))


def _files(data: Path) -> list[Path]:
    return sorted(path for part in ("train", "held_out") for path in (data / part).iterdir())


@pytest.mark.parametrize(
    ("num_ids", "types"),
    [
        (32_768, ("uint16", "int16")),
        (32_769, ("uint16", "int32")),
        (65_536, ("uint16", "int32")),
        (65_537, ("int32", "int32")),
    ],
)
def test_the_smallest_integers_hold_every_id_and_every_label(num_ids: int, types: tuple[str, str]) -> None:
    assert id_types(num_ids) == types


def test_saved_rows_have_small_integers_and_the_same_values(prepared: PreparedData, tmp_path: Path) -> None:
    save(prepared, tmp_path / "data")
    train = load(tmp_path / "data").train
    assert {name: each.feature.dtype for name, each in train.features.items()} == {
        "input_ids": "uint16",
        "labels": "int16",
        "seq_lengths": "int32",
    }
    assert train.to_dict() == prepared.train.to_dict()
    assert any(label == -100 for row in train["labels"] for label in row)


def test_equal_rows_of_two_sweeps_are_on_disk_once(prepared: PreparedData, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(prepared, tmp_path / name / "data", siblings=tmp_path)
    one, two = (_files(tmp_path / name / "data") for name in ("one", "two"))
    assert [file.name for file in one] == [file.name for file in two]
    assert all(a.samefile(b) for a, b in zip(one, two, strict=True))
    for file in one:
        file.unlink()
    assert load(tmp_path / "two" / "data").train.to_dict() == prepared.train.to_dict()


def test_other_rows_are_not_shared(prepared: PreparedData, tmp_path: Path) -> None:
    other = prepare(DataSection.model_validate(SECTION | {"max_rows": 50}), BaseSection(model="embedded"))
    save(prepared, tmp_path / "one" / "data", siblings=tmp_path)
    save(other, tmp_path / "two" / "data", siblings=tmp_path)
    assert load(tmp_path / "two" / "data").train.to_dict() == other.train.to_dict()
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "two" / "data" / "train").glob("*.arrow"))


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "gone"])
def test_shared_rows_that_do_not_match_are_written_anew(change: str, prepared: PreparedData, tmp_path: Path) -> None:
    save(prepared, tmp_path / "one" / "data", siblings=tmp_path)
    (file,) = (tmp_path / "one" / "data" / "train").glob("*.arrow")
    whole = file.read_bytes()
    middle = len(whole) // 2
    if change == "gone":
        file.unlink()
    else:
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        file.write_bytes({"flip": flipped, "cut": whole[:middle], "empty": b""}[change])
    save(prepared, tmp_path / "two" / "data", siblings=tmp_path)
    assert load(tmp_path / "two" / "data").train.to_dict() == prepared.train.to_dict()


def _save(rows: dict[str, list[list[int]]], folder: Path) -> None:
    from orchestrator.data.shared_rows import write_rows

    (folder / "data").mkdir(parents=True)
    write_rows(Dataset.from_dict(rows), folder / "data" / "train", folder.parent)


def test_sweeps_that_start_at_once_all_have_whole_rows(prepared: PreparedData, tmp_path: Path) -> None:
    rows, context = prepared.train.to_dict(), get_context("spawn")
    processes = [context.Process(target=_save, args=(rows, tmp_path / str(i))) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    for i in range(3):
        assert Dataset.load_from_disk(tmp_path / str(i) / "data" / "train").to_dict() == rows


def test_the_digest_does_not_depend_on_how_rows_are_split_into_arrays() -> None:
    """Rows of more than 2^31 - 1 tokens are several arrays."""
    parts = [Dataset.from_dict({"input_ids": ids, "labels": ids}) for ids in ([[1, 2], [3]], [[4, 5, 6]], [[], [7]])]
    split = concatenate_datasets(parts)
    whole = Dataset.from_dict(split.to_dict())
    assert len(split.data.column("labels").chunks) == 3
    assert _digest(split) == _digest(whole)
    assert _digest(whole) != _digest(
        Dataset.from_dict({**whole.to_dict(), "labels": [[1], [2, 3], [4, 5, 6], [], [7]]})
    )


class Unjoinable:
    """Rows of one column, whose arrays hold too many values to be joined."""

    def __init__(self, rows: Dataset) -> None:
        self.column_names = rows.column_names
        column = rows.data.column(rows.column_names[0])
        self.type, self.chunks, self._length = column.type, column.chunks, len(column)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, _: slice) -> "Unjoinable":
        return self

    def with_format(self, _: str) -> "Unjoinable":
        return self

    def column(self, _: str) -> "Unjoinable":
        return self

    def combine_chunks(self) -> None:
        raise AssertionError("offset overflow while concatenating arrays")


def test_more_than_2_31_tokens_have_a_digest() -> None:
    split = concatenate_datasets([Dataset.from_dict({"input_ids": [[1, 2]]})] * 2)
    assert _digest(Unjoinable(split)) == _digest(split)

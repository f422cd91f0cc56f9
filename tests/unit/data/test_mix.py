"""Sources: the rows that each gives, streams, and held-out rows that must not be training rows."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetGenerationError

from orchestrator.base import load_tokenizer
from orchestrator.data import prepare
from orchestrator.data.mix import read_mixed, rows_per_source, split_indices
from orchestrator.data.sources import read_rows
from orchestrator.errors import DataError
from orchestrator.spec.sections import BaseSection, DataSection, Source

BASE = BaseSection(model="embedded")


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """Sources a, b and c, of 90, 40 and 25 rows."""
    paths = {}
    for name, count in {"a": 90, "b": 40, "c": 25}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count)))
        paths[name] = str(path)
    return paths


def section(**fields: Any) -> DataSection:
    return DataSection.model_validate({"format": "text", **fields})


def texts(data: DataSection) -> tuple[list[str], list[str]]:
    mixed = read_mixed(data)
    chosen: set[int] = split_indices(len(mixed.rows), data)[0]
    found = [row.values["text"] for row in mixed.rows]
    held_out = [text for i, text in enumerate(found) if i in chosen]
    return [text for i, text in enumerate(found) if i not in chosen], [
        *held_out, *(row.values["text"] for row in mixed.held_out)
    ]  # fmt: skip


def test_a_missing_column_is_reported_before_rows_are_counted(sources: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"txt": "1"}\n' * 9)
    mix = [{"source": sources["a"], "weight": 9}, {"source": str(other), "weight": 1}]
    for fields in (
        {"source": str(other), "held_out": {"count": 20}},
        {"mix": mix, "held_out": {"count": 9}},
        {"source": sources["a"], "held_out": {"source": str(other)}},
    ):
        with pytest.raises(DataError, match=r"other\.jsonl:1: there is no column 'text'; columns: 'txt'"):
            read_mixed(section(**fields))


@pytest.mark.parametrize(
    ("sizes", "weights", "numbers"),
    [
        ([90, 40], [1.0, 1.0], [40, 40]),
        ([90, 40], [3.0, 1.0], [90, 30]),
        ([90, 40], [0.1, 0.9], [4, 40]),
        ([90, 40, 25], [2.0, 1.0, 1.0], [50, 25, 25]),
        ([5, 1000], [1.0, 2000.0], [1, 1000]),
        ([7], [3.0], [7]),
    ],
)
def test_shares_are_exact_and_no_row_is_used_twice(sizes: list[int], weights: list[float], numbers: list[int]) -> None:
    assert rows_per_source(sizes, weights) == numbers


def test_a_mix_has_its_weights_and_the_same_rows_each_time(sources: dict[str, str]) -> None:
    mix = [{"source": sources["a"], "weight": 3}, {"source": sources["b"], "weight": 1}]
    train, held_out = texts(section(mix=mix, held_out={"count": 12}))
    assert Counter(text[0] for text in train + held_out) == {"a": 90, "b": 30}
    assert len(set(train + held_out)) == 120
    assert texts(section(mix=mix, held_out={"count": 12})) == (train, held_out)
    other = texts(section(mix=mix, held_out={"count": 12}, seed=7))
    assert {text for part in other for text in part} != {*train, *held_out}, "another seed draws other rows"
    prepared = prepare(section(mix=mix, held_out={"count": 12}), BASE)
    recorded = [(source.source, source.weight, source.num_read, source.num_taken) for source in prepared.sources]
    assert recorded == [(sources["a"], 3, 90, 90), (sources["b"], 1, 40, 30)]


def test_a_mix_without_weights_has_all_rows(sources: dict[str, str]) -> None:
    mix = [{"source": sources["a"], "max_rows": 10}, {"source": sources["c"]}]
    train, held_out = texts(section(mix=mix, held_out={"count": 5}))
    assert sorted(train + held_out) == sorted([f"a {i}" for i in range(10)] + [f"c {i}" for i in range(25)])


def test_held_out_rows_may_be_a_mix(sources: dict[str, str]) -> None:
    held_out = {"mix": [{"source": sources["b"], "weight": 1}, {"source": sources["c"], "weight": 1}]}
    train, kept = texts(section(source=sources["a"], held_out=held_out))
    assert train == [f"a {i}" for i in range(90)]
    assert Counter(text[0] for text in kept) == {"b": 25, "c": 25}


@pytest.mark.parametrize("training", [".", "*.jsonl", "[ab].jsonl"])
def test_a_held_out_file_among_the_training_files_is_refused(
    sources: dict[str, str], tmp_path: Path, training: str
) -> None:
    with pytest.raises(DataError, match=r"data.held_out: .*b\.jsonl is among the training rows"):
        read_mixed(section(source=str(tmp_path / training), held_out={"source": sources["b"]}))
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "link.jsonl").symlink_to(sources["a"])
    with pytest.raises(DataError, match=r"link\.jsonl is among the training rows"):
        read_mixed(section(source=str(tmp_path / "*.jsonl"), held_out={"source": str(tmp_path / "apart")}))


@pytest.mark.parametrize("held_out", ["saved", "again/../saved", "link"])
def test_a_saved_data_set_without_splits_cannot_be_held_out_of_itself(tmp_path: Path, held_out: str) -> None:
    Dataset.from_list([{"text": f"row {i}"} for i in range(6)]).save_to_disk(tmp_path / "saved")
    (tmp_path / "again").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "saved")
    with pytest.raises(DataError, match=r"data.held_out: .* is among the training rows"):
        read_mixed(section(source=str(tmp_path / "saved"), held_out={"source": str(tmp_path / held_out)}))


def test_splits_of_a_saved_data_set_are_separate(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    parts = {split: [{"text": f"{split} {i}"} for i in range(3)] for split in ("train", "test", "dev")}
    DatasetDict({split: Dataset.from_list(rows) for split, rows in parts.items()}).save_to_disk(saved)
    train, held_out = texts(section(source=saved, held_out={"source": saved}))
    assert (train, held_out) == (["train 0", "train 1", "train 2"], ["test 0", "test 1", "test 2"])
    train, held_out = texts(section(source=saved, split="dev", held_out={"source": saved}))
    assert (train[0], held_out[0]) == ("dev 0", "test 0")
    with pytest.raises(DataError, match=r"saved/test is among the training rows"):
        read_mixed(section(source=saved, split="test", held_out={"source": f"{saved}/test"}))


def test_a_file_that_is_read_twice_is_refused_by_both_names(sources: dict[str, str], tmp_path: Path) -> None:
    twice = [{"source": str(tmp_path / "[ab].jsonl")}, {"source": sources["b"]}]
    both = r": .*/b\.jsonl \(.*/b\.jsonl\) is already read as .*/b\.jsonl \(.*/\[ab\]\.jsonl\)"
    with pytest.raises(DataError, match=f"^data{both}"):
        read_mixed(section(mix=twice))
    with pytest.raises(DataError, match=f"^data.held_out{both}"):
        read_mixed(section(source=sources["c"], held_out={"mix": twice}))
    (tmp_path / "link.jsonl").symlink_to(sources["a"])
    with pytest.raises(DataError, match=r"link\.jsonl .* is already read as .*/a\.jsonl"):
        read_mixed(section(source=str(tmp_path)))


def test_the_same_rows_of_two_sources_are_counted(sources: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "held.csv").write_text("text\na 3\nnew\na 3\n")
    prepared = prepare(section(source=sources["a"], held_out={"source": str(tmp_path / "held.csv")}), BASE)
    assert prepared.num_shared == 2, "each held-out row, though it is the same one"


class Hub:
    """A data set of 1000 rows in ten files that counts the rows read from it."""

    def __init__(self) -> None:
        self.taken = 0
        self.asked: list[tuple[Any, ...]] = []

    def load_dataset(self, name: str, config: str | None, split: str, streaming: bool = False) -> Any:
        self.asked.append((name, config, split, streaming))
        if not streaming:
            return Dataset.from_list([{"text": f"row {i}"} for i in range(6)])
        return IterableDataset.from_generator(self._rows, gen_kwargs={"files": list(range(10))})

    def _rows(self, files: list[int]) -> Iterator[dict[str, str]]:
        for file in files:
            for i in range(100):
                self.taken += 1
                yield {"text": f"row {100 * file + i}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def test_a_stream_is_read_as_far_as_needed_in_a_seeded_order(hub: Hub) -> None:
    source = Source(source="owner/rows", config="main", split="train", max_rows=30, stream_buffer=50)
    rows = read_rows(source, seed=3)
    assert hub.asked == [("owner/rows", "main", "train", True)]
    assert len({row.values["text"] for row in rows}) == 30
    assert hub.taken <= 30 + 2 * 50, "and not the other 900"
    assert [row.where for row in rows[:2]] == ["owner/rows[train] streamed row 0", "owner/rows[train] streamed row 1"]
    assert read_rows(source, seed=3) == rows
    other = read_rows(source, seed=4)
    assert {row.values["text"] for row in other} != {row.values["text"] for row in rows}, "other files and rows"
    numbers = [int(row.values["text"].split()[1]) for row in rows]
    assert numbers != sorted(numbers)


def test_a_hub_data_set_that_is_not_streamed(hub: Hub) -> None:
    data = section(source="owner/rows", max_rows=6, held_out={"source": "owner/rows", "max_rows": 2})
    assert [len(part) for part in texts(data)] == [6, 2]
    assert hub.asked == [("owner/rows", None, "train[:6]", False), ("owner/rows", None, "test[:2]", False)]


def test_an_error_of_the_library_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise DatasetGenerationError("An error occurred while generating the dataset")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"owner/rows \(split train\): cannot be loaded from the hub: An error occurred"
    ):
        read_rows(Source(source="owner/rows"))


def test_the_split_does_not_depend_on_the_tokenizer(sources: dict[str, str]) -> None:
    data = section(source=sources["a"], held_out={"share": 0.2})
    held_out = prepare(data, BASE).held_out
    longer = prepare(data.model_copy(update={"max_length": 8, "packing": True}), BASE).held_out
    tokenizer = load_tokenizer(BASE)
    assert [tokenizer.decode(ids) for ids in held_out["input_ids"]] == [f"<s>{text}</s>" for text in texts(data)[1]]
    assert longer["input_ids"] == held_out["input_ids"]

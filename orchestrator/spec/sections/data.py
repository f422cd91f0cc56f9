"""The data section: where rows come from, and how they become tokens."""

import re
from collections.abc import Iterable
from itertools import combinations, product
from pathlib import PurePath
from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section, Seed
from orchestrator.spec.template import check_chat_template, lacks_stop_token, optional_columns, template_columns

FILE_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
"""Extensions of files with rows, in lower case."""

COMPRESSED = (".gz", ".bz2", ".xz")
"""Extensions that may follow those of any kind except Parquet, which compresses its content itself."""

GLOB = re.compile(r"[*?\[]")
"""Characters that make a path a pattern."""

COLUMNS_OF = {
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "alpaca": ["instruction", "output"],
    "prompt": ["prompt", "completion"],
    "text": ["text"],
}
"""Format -> columns that every row must have; those of format template follow from the template."""

Name = Annotated[str, Field(min_length=1)]
Delimiter = Annotated[str, Field(min_length=1, max_length=1)]


def file_kind(path: str | PurePath) -> str | None:
    """Return the kind of a file of rows: its extension in lower case, without compression; None if it is unknown."""
    endings = [ending.lower() for ending in PurePath(path).suffixes]
    is_compressed = bool(endings) and endings[-1] in COMPRESSED
    kind = (endings[:-1] if is_compressed else endings)[-1:]
    return kind[0] if kind and kind[0] in FILE_KINDS and not (is_compressed and kind[0] == ".parquet") else None


class Source(Section):
    """One source of rows."""

    source: Name
    """File (JSONL, JSON, CSV, TSV, text, Parquet), folder, glob, saved data set, hub id, or `embedded`."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the rows, relative to the other weights. Each row is used at most once. Give all sources a weight, or
    none."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set, or of a saved one with splits. Default: train; for held-out rows test."""
    max_rows: PositiveInt | None = None
    """Use only this many rows: the first ones, or the first ones of the stream."""
    stream_buffer: PositiveInt | None = None
    """Stream a hub data set instead of downloading it, through a seeded shuffle buffer of this many rows. Needs
    max_rows."""
    delimiter: Delimiter | None = None
    """Character between the fields of CSV files. Default: a comma, or a tab in TSV files."""
    _default_split: str = PrivateAttr("train")

    @property
    def is_local(self) -> bool:
        """Whether this is a path or the embedded task, not a hub id."""
        return self.source == "embedded" or self.source.startswith("/")

    @property
    def has_splits(self) -> bool:
        """Whether the source may have splits, judged by its name. A file or a pattern of files has none."""
        path = PurePath(self.source)
        is_file = file_kind(path) is not None or GLOB.search(path.name) is not None
        return self.source != "embedded" and not (self.is_local and is_file)

    @property
    def default_split(self) -> str:
        """The split that is read if `split` is not given."""
        return self._default_split

    @property
    def used_split(self) -> str | None:
        """The split that is read; None if the source has no splits."""
        return (self.split or self._default_split) if self.has_splits else None

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        _require_fit(self)
        return self


def _require_fit(source: Source) -> None:
    """Refuse fields that mean nothing for this source.

    Raises:
        ValueError: names the field and the source.
    """
    if source.is_local and source.config is not None:
        raise ValueError(f"config belongs to a hub data set, but source is {source.source}")
    if source.split is not None and not source.has_splits:
        raise ValueError(f"split belongs to a hub data set or a saved one, but source is {source.source}")
    may_be_csv = source.is_local and source.source != "embedded" and file_kind(source.source) in (None, ".csv", ".tsv")
    if source.delimiter is not None and not may_be_csv:
        raise ValueError(f"delimiter belongs to CSV files, but source is {source.source}")
    if source.delimiter in ('"', "\r", "\n"):
        raise ValueError(f"delimiter {source.delimiter!r} has another meaning in a CSV file")
    if source.max_rows is not None and source.split is not None and "[" in source.split:
        raise ValueError(f"max_rows with split {source.split}: the split is a slice already; write the number into it")
    if source.stream_buffer is not None and source.is_local:
        raise ValueError(
            f"stream_buffer belongs to a hub data set, but source is {source.source}; use max_rows to read fewer rows"
        )
    if source.stream_buffer is not None and source.max_rows is None:
        raise ValueError("stream_buffer needs max_rows: it says how many rows of the stream are read")


_FIELDS_OF_SOURCE = ("config", "split", "max_rows", "stream_buffer", "delimiter")
"""Fields of a section that belong to its `source`; in a mix each source has its own."""


def _sources(section: "DataSection | HeldOut", split: str) -> list[Source]:
    """Return the one source, or those of the mix, each with its default split.

    Raises:
        ValueError: fields do not go together.
    """
    given = {name: getattr(section, name) for name in _FIELDS_OF_SOURCE if getattr(section, name) is not None}
    if section.source is not None:
        sources = [Source.model_construct(source=section.source, **given)]
        _require_fit(sources[0])
    elif given:
        raise ValueError(f"{', '.join(given)} belong to a source; in a mix, write them into each source")
    else:
        sources = list(section.mix)
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        raise ValueError(f"mix: {len(weighted)} of {len(sources)} sources have a weight; give all of them one, or none")
    sources = [source.model_copy() for source in sources]
    for source in sources:
        source._default_split = split
    if twice := _shared(combinations(sources, 2)):
        raise ValueError(f"mix: {twice} appears twice; use each source once")
    return sources


def _shared(pairs: Iterable[tuple[Source, Source]]) -> str | None:
    """Return the first source that shares rows with the other one of its pair, judged by what is written."""
    return next((source.source for other, source in pairs if _overlap(source, other)), None)


def _overlap(source: Source, other: Source) -> bool:
    if (source.source, source.config) != (other.source, other.config):
        return False
    split, others = source.used_split or "", other.used_split or ""
    are_slices = "[" in split and "[" in others  # slices may be disjoint
    return split == others or (not are_slices and split.partition("[")[0] == others.partition("[")[0])


class HeldOut(Section):
    """Rows kept for evaluation, the same for every trial. Give exactly one of share, count, source, mix."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the rows."""
    count: PositiveInt | None = None
    """Number of rows."""
    source: Name | None = None
    """Separate rows, from any source that training rows may have."""
    mix: list[Source] = []
    """Several such sources, as in data.mix."""
    config: str | None = None
    """Configuration of the hub data set in `source`."""
    split: str | None = None
    """Split of the data set in `source`. Default: test."""
    max_rows: PositiveInt | None = None
    """Use only this many rows of `source`: the first ones, or the first ones of the stream."""
    stream_buffer: PositiveInt | None = None
    """Stream the hub data set in `source`, as data.stream_buffer does."""
    delimiter: Delimiter | None = None
    """Character between the fields of the CSV files in `source`."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("share", "count", "source") if getattr(self, name) is not None]
        given += ["mix"] if self.mix else []
        if len(given) != 1:
            raise ValueError(f"needs exactly one of share, count, source, mix, but got {given or 'none'}")
        beside = [name for name in _FIELDS_OF_SOURCE if getattr(self, name) is not None]
        if given[0] in ("source", "mix"):
            _sources(self, "test")
        elif beside:
            raise ValueError(
                f"{', '.join(beside)} belong to a source, and none is given; give source, or leave them out"
            )
        return self

    @property
    def sources(self) -> list[Source]:
        """Sources of held-out rows; empty if they are taken from the training rows."""
        return _sources(self, "test") if self.source is not None or self.mix else []


class DataSection(Section):
    """Where rows come from, and how they become tokens. Rows are tokenized once and shared by all trials."""

    source: Name | None = None
    """JSONL, JSON, CSV, TSV, text or Parquet file, folder or glob of them, saved data set, hub id, or `embedded`."""
    mix: list[Source] = []
    """Several sources instead of one. With weights, as many rows as can have these shares are drawn, by `seed`."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set, or of a saved one with splits. Default: train."""
    max_rows: PositiveInt | None = None
    """Use only this many rows: the first ones, or the first ones of the stream."""
    stream_buffer: PositiveInt | None = None
    """Stream a hub data set instead of downloading it, through a seeded shuffle buffer of this many rows. Needs
    max_rows."""
    delimiter: Delimiter | None = None
    """Character between the fields of CSV files. Default: a comma, or a tab in TSV files."""
    format: Literal["text", "prompt", "messages", "sharegpt", "alpaca", "template"]
    """Columns that are read. text: text. prompt: prompt, completion. messages: messages, tools. sharegpt:
    conversations. alpaca: instruction, input, output. template: those named in `template`."""
    template: str | None = None
    """Text with {column} fields. {column?} may be empty. {?column}...{/column} is written only if the column is not
    empty. The completion starts at the last field."""
    chat_template: str | None = None
    """Jinja file that formats conversations, instead of the tokenizer's own template. A resolved experiment holds the
    file's text."""
    roles: dict[Name, Name] = {}
    """Speakers' names in conversations and their roles, such as {bot: assistant, person: user}."""
    bad_rows: Literal["error", "drop"] = "error"
    """What happens to rows that the format cannot use: error refuses them, drop leaves them out and counts them. A file
    that cannot be parsed is always an error."""
    loss_on: Literal["all", "completion", "assistant"] = "all"
    """Tokens that are trained and evaluated on: all, those of the last answer, or those of every assistant turn."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Maximum number of tokens in a row, and in a packed sequence."""
    truncate: Literal["right", "left", "error"] = "right"
    """Side on which longer rows are cut (left keeps the beginning-of-text token). Cut rows are counted. error refuses
    them instead."""
    require_stop: bool = True
    """Refuse data in which no row teaches the model to end with a stop token: answers would run on to
    max_new_tokens."""
    packing: bool = False
    """Put several training rows into one sequence of up to max_length tokens. Rows do not see each other."""
    held_out: HeldOut = HeldOut(share=0.1)
    """Rows for evaluation."""
    test: HeldOut | None = None
    """More rows apart, which no decision of the sweep sees: `sweep` measures its winner on them at the end."""
    seed: Seed = 42
    """Seed of the split, of a mix and of a stream."""

    @property
    def sources(self) -> list[Source]:
        """Where training rows come from."""
        return _sources(self, "train")

    @property
    def has_turns(self) -> bool:
        """Whether rows are conversations, which a chat template formats."""
        return self.format in ("messages", "sharegpt")

    @property
    def lacks_stop_token(self) -> bool:
        """Whether certainly no row has a stop token in the loss. Only a chat template given here can prove that."""
        return self.chat_template is not None and lacks_stop_token(self.chat_template, self.loss_on)

    @property
    def columns(self) -> list[str]:
        """Columns that every row must have."""
        return template_columns(self.template or "") if self.format == "template" else COLUMNS_OF[self.format]

    @property
    def optional_columns(self) -> set[str]:
        """Columns of the template that may be empty, or missing from a row."""
        return optional_columns(self.template) if self.template else set()

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        given = [name for name in ("source", "mix") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of source, mix, but got {given or 'none'}")
        if twice := _shared(product(self.sources, self.held_out.sources)):
            name = "source" if self.held_out.source else f"mix: {twice}"
            raise ValueError(
                f"held_out.{name} is the training source: trials would be scored on what they were trained on; "
                "give other rows"
            )
        for name, others in (("the training source", self.sources), ("held_out.source", self.held_out.sources)):
            if self.test is not None and (twice := _shared(product(others, self.test.sources))):
                raise ValueError(f"test: {twice} is {name} too: no decision may see test rows; give other rows")
        return self

    @model_validator(mode="after")
    def _format_fits(self) -> Self:
        if self.format == "template" and not self.template:
            raise ValueError("format template needs a template, such as '<s>[INST] {question} [/INST] {answer} </s>'")
        if self.format != "template" and self.template:
            raise ValueError(f"a template is given, but format is {self.format}; set format: template")
        if self.template:
            template_columns(self.template)
        if self.chat_template is not None and not self.has_turns:
            raise ValueError(f"chat_template formats conversations, but format is {self.format}; leave it out")
        if self.roles and not self.has_turns:
            raise ValueError(f"roles name the speakers of conversations, but format is {self.format}; leave them out")
        if self.chat_template is not None:
            check_chat_template(self.chat_template)
        if self.format == "text" and self.loss_on != "all":
            raise ValueError(f"loss_on: {self.loss_on} needs a prompt, and format text has none; use loss_on: all")
        if self.loss_on == "assistant" and not self.has_turns:
            raise ValueError(f"loss_on: assistant needs turns; format {self.format} has none, use loss_on: completion")
        return self

"""The data section: rows and how they become tokens."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.spec.sections.section import PositiveInt, Section


class HeldOut(Section):
    """Rows kept for evaluation, the same for every trial. Exactly one of share, count, source."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the rows."""
    count: PositiveInt | None = None
    """Number of rows."""
    source: Annotated[str, Field(min_length=1)] | None = None
    """Own JSONL file or hub id."""
    config: str | None = None
    """Configuration of the hub data set in `source`."""
    split: str = "test"
    """Split of the hub data set in `source`."""
    max_rows: PositiveInt | None = None
    """Use only the first rows of `source`."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("share", "count", "source") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of share, count, source, but got {given or 'none'}")
        if self.source is None and (self.config is not None or self.max_rows is not None or self.split != "test"):
            raise ValueError("config, split and max_rows belong to a source, and none is given")
        return self


class DataSection(Section):
    """Where rows come from and how they become tokens. Tokenised once, shared by all trials."""

    source: Annotated[str, Field(min_length=1)]
    """JSONL file, hub id, or `embedded` for the task of the embedded base."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    format: Literal["text", "prompt", "messages", "template"]
    """Columns: `text`; `prompt` and `completion`; `messages` (chat template); or any, through `template`."""
    template: str | None = None
    """Text with {column} fields; the completion starts at the last field."""
    loss_on: Literal["all", "completion"] = "all"
    """Which tokens are trained and evaluated on."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens a row; longer rows are cut on the right, and counted."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""
    held_out: HeldOut = HeldOut(share=0.1)
    """Rows for evaluation."""
    seed: int = 42
    """Seed of the split."""

    @staticmethod
    def is_local(source: str) -> bool:
        """Whether a source is a file or the embedded task, and not a hub id."""
        return source == "embedded" or source.startswith("/")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.format == "template" and not self.template:
            raise ValueError("format template needs a template, such as '<s>[INST] {question} [/INST] {answer} </s>'")
        if self.format != "template" and self.template:
            raise ValueError(f"a template is given, but format is {self.format}; set format: template")
        if self.held_out.source == self.source and (
            self.is_local(self.source) or (self.held_out.config, self.held_out.split) == (self.config, self.split)
        ):
            raise ValueError("held_out.source is the training source: the trials would be scored on what they learned")
        if self.is_local(self.source) and (self.config is not None or self.split != "train"):
            raise ValueError(f"config and split belong to a hub data set, but source is {self.source}")
        if self.format == "text" and self.loss_on == "completion":
            raise ValueError("loss_on: completion needs to know the prompt; format text has none")
        return self

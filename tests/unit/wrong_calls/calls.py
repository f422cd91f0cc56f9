"""Wrong calls: what is typed, in which files, and what the message must contain."""

from typing import NamedTuple

EXPERIMENT = """\
base: {model: embedded}
data:
  source: embedded
  format: template
  template: "{question} {answer}"
training: {steps: 2, batch_size: 2}
tracking: {tensorboard: false, wandb: {mode: disabled}}
"""


class Wrong(NamedTuple):
    """A wrong call, made in a folder with these files (x.yaml is always there)."""

    name: str
    call: list[str]
    words: tuple[str, ...]
    """What the message must contain."""
    files: dict[str, str | bytes] = {}


def written(name: str, text: str | bytes, *words: str) -> Wrong:
    """Return a call with a wrong experiment file."""
    return Wrong(name, ["check", "x.yaml"], ("x.yaml", *words), {"x.yaml": text})


def added(name: str, text: str, *words: str) -> Wrong:
    """Return a call with wrong lines at the end of a right experiment file."""
    return written(name, EXPERIMENT + text, *words)


def overridden(name: str, overrides: list[str], *words: str) -> Wrong:
    """Return a call with wrong overrides of a right experiment file."""
    return Wrong(name, ["check", "x.yaml", *options(overrides)], words)


def trial(name: str, overrides: list[str], *words: str) -> Wrong:
    """Return a call whose fault is found when the tokenizer and the data are read."""
    return Wrong(name, ["trial", "x.yaml", *options(overrides)], words)


def jsonl(name: str, rows: str | bytes, *words: str, format: str = "text") -> Wrong:
    """Return a call with a wrong JSONL file."""
    overrides = ["data={source: rows.jsonl, format: " + format + "}"]
    return Wrong(name, ["trial", "x.yaml", *options(overrides)], words, {"rows.jsonl": rows})


def data_file(name: str, file: str, content: str, *words: str) -> Wrong:
    """Return a call with a wrong data file of another kind."""
    overrides = ["data={source: ./" + file + ", format: text}"]
    return Wrong(name, ["trial", "x.yaml", *options(overrides)], words, {file: content})


def command(name: str, call: list[str], *words: str) -> Wrong:
    return Wrong(name, call, words)


def options(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]

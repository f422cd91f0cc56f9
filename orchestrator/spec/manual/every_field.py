"""The example that shows every field with its default, each under its documentation. It is a valid experiment."""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from orchestrator.spec.manual.tree import NOTHING, Field, FieldGroup

_GIVEN: dict[str, Any] = {
    "base.model": "embedded",
    "data.source": "embedded",
    "data.format": "template",
    "data.template": "<s>[INST] {question} [/INST] {answer} </s>",
    "search.space": {"lora.rank": {"choice": [8, 16, 32]}, "training.learning_rate": {"loguniform": [5e-5, 1e-3]}},
    "search.tied": {"lora.alpha": "2 * lora.rank"},
    "search.prior": {"lora.rank": 16},
}
"""Values shown instead of a default: if there is none, or if it would show nothing."""

_HEAD = """\
# yaml-language-server: $schema=experiment.schema.json
# Every field of an experiment with its default, under its documentation and, in brackets, what it takes. Copy what you
# need: an experiment file holds only what differs. Generated from the specification by `make manual`; do not edit.
"""
_WIDTH = 118


def print_every_field(tree: FieldGroup) -> str:
    """Return an experiment file (YAML)."""
    parts = []
    for section in tree.fields:
        group = section.parts[0]
        value = {} if section.default is NOTHING else section.default
        group = section.part_of(value) or group
        parts.append(
            "\n".join([*_comment(group.sentence, ""), f"{section.name}:", *_lines(section, group, value, "  ")])
        )
    return "\n\n".join([_HEAD.rstrip("\n"), *parts]) + "\n"


def _lines(holder: Field, group: FieldGroup, value: dict[str, Any], indent: str) -> Iterator[str]:
    """Yield the fields of a section, then, as comments, those of other sections that could take its place."""
    for field in group.fields:
        own = _GIVEN.get(f"{group.path}.{field.name}", value.get(field.name, field.default))
        if own is NOTHING:
            own = group.marks[field.name]
        if part := field.part_of(own):
            yield from _comment(part.sentence, indent)
            yield f"{indent}{field.name}:"
            yield from _lines(field, part, own, f"{indent}  ")
        else:
            yield from _comment(f"{field.sentence} [{field.values.replace('`', '')}]", indent)
            yield from _item(field.name, own, indent)
            for entry in field.parts:
                if entry.path.endswith("[]"):
                    yield from _beside("Each", entry, f"{indent}  ")
    for other in holder.parts:
        if other.path == group.path and other is not group:
            yield from _beside("Or", other, indent)


def _beside(word: str, group: FieldGroup, indent: str) -> Iterator[str]:
    """Yield the fields of a section that is not in the example, as comments."""
    yield from _comment(f"{word}: {group.sentence}", indent)
    for field in group.fields:
        shown = group.marks.get(field.name, None if field.default is NOTHING else field.default)
        start = f"{indent}# {field.name}: {_flow(shown)}".ljust(len(indent) + 34) + "  # "
        below = f"{indent}#".ljust(len(start) - 2) + "# "
        yield from _wrapped(field.sentence, start, below)


def _item(name: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        yield f"{indent}{name}:"
        yield from (f"{indent}  {key}: {_flow(each)}" for key, each in value.items())
    else:
        yield f"{indent}{name}: {_flow(value)}"


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return _wrapped(text, start, start)


def _wrapped(text: str, first: str, below: str) -> list[str]:
    """Wrap a text into lines, the first and the following ones with these prefixes."""
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=below, break_on_hyphens=False)

"""The reference: every field of an experiment, as Markdown."""

import json

from orchestrator.spec.manual.tree import NOTHING, Field, FieldGroup

_HEAD = """\
# Every field of an experiment

Generated from the specification by `make manual`; do not edit. `orchestrator check FILE` prints a file with all of its
fields resolved. [every-field.yaml](../experiments/every-field.yaml) shows all fields as one experiment.
[experiment.schema.json](../experiments/experiment.schema.json) lets editors complete and check them. Unknown fields are
refused.
"""


def print_reference(tree: FieldGroup) -> str:
    """Return Markdown with one table for each section and one row for each field."""
    return "\n".join([_HEAD, *(_part(group) for group in tree.walk() if group.path)])


def _part(group: FieldGroup) -> str:
    marks = ", ".join(f"{name}: {value}" for name, value in group.marks.items())
    title = f"{'#' * min(4, 2 + group.path.count('.'))} `{group.path}`" + (f" with `{marks}`" if marks else "")
    rows = [_row(field) for field in group.fields]
    table = ["| field | takes | default | meaning |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([title, "", group.sentence, "", *table, ""])


def _row(field: Field) -> str:
    default = "required" if field.required else _default(field)
    cells = [f"`{field.name}`", field.values, default, " ".join(field.sentence.split())]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: Field) -> str:
    if field.default is NOTHING:
        return ""
    if part := field.part_of(field.default):
        own = {each.name: each.default for each in part.fields}
        given = {name: value for name, value in field.default.items() if value != own[name]}
        return f"`{json.dumps(given)}`" if given else "the defaults of its fields"
    return f"`{field.default if isinstance(field.default, str) else json.dumps(field.default)}`"

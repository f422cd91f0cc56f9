"""The fields of an experiment as a small tree, read from its JSON Schema."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Node = dict[str, Any]
NOTHING = object()


@dataclass(frozen=True)
class Field:
    """One field."""

    name: str
    sentence: str
    """The field's documentation."""
    values: str
    """What the field takes, in words, with `code` in backquotes."""
    required: bool
    default: Any
    """NOTHING if there is none."""
    parts: list["FieldGroup"]
    """Sections that the field may hold; several are the members of a union."""

    def part_of(self, value: Any) -> "FieldGroup | None":
        """Return the section of which `value` is an instance; None if it is none."""
        if not isinstance(value, dict):
            return None
        held = [part for part in self.parts if part.path.endswith(self.name) and part.marks.items() <= value.items()]
        return held[0] if held else None


@dataclass(frozen=True)
class FieldGroup:
    """A section, or one member of a union of them."""

    path: str
    """Dotted path from the root of the experiment; `*` stands for any key, `[]` for an entry of a list."""
    marks: dict[str, Any]
    """Field -> the only value that it can have here, which tells a member of a union from the others."""
    sentence: str
    """The section's documentation."""
    fields: list[Field]

    def walk(self) -> Iterator["FieldGroup"]:
        """Yield this group and all groups below it, in the order of the fields."""
        yield self
        for field in self.fields:
            for part in field.parts:
                yield from part.walk()


def read_tree(schema: Node) -> FieldGroup:
    """Return the tree of a whole schema; its root has an empty path."""
    return _group(schema, schema.get("$defs", {}), "", is_member=False)


def _group(node: Node, defs: Node, path: str, *, is_member: bool) -> FieldGroup:
    properties: dict[str, Node] = node["properties"]
    marks = {name: field["const"] for name, field in properties.items() if is_member and "const" in field}
    fields = []
    for name, field in properties.items():
        below = list(_parts(field, defs, f"{path}.{name}".lstrip(".")))
        parts = [_group(part, defs, where, is_member=len(below) > 1) for part, where in below]
        required = name in node.get("required", []) or name in marks
        sentence = field.get("description", "")
        fields.append(Field(name, sentence, _values(field), required, field.get("default", NOTHING), parts))
    return FieldGroup(path, marks, node.get("description", ""), fields)


def _parts(node: Node, defs: Node, path: str) -> Iterator[tuple[Node, str]]:
    """Yield the sections in a field, each with its path."""
    if "$ref" in node:
        yield defs[node["$ref"].rpartition("/")[2]], path
    for choice in _choices(node):
        yield from _parts(choice, defs, path)
    if isinstance(node.get("items"), dict):
        yield from _parts(node["items"], defs, f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from _parts(node["additionalProperties"], defs, f"{path}.*")


def _choices(node: Node) -> list[Node]:
    return node.get("anyOf") or node.get("oneOf") or []


def _values(node: Node) -> str:
    """Return what a field takes, in words."""
    words = list(dict.fromkeys(_alternatives(node)))
    if len(words) > 1 and node.get("default", NOTHING) is None:
        words.remove("`null`")  # the default shows it
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _alternatives(node: Node) -> Iterator[str]:
    for choice in _choices(node):
        yield from _alternatives(choice)
    if _choices(node):
        return
    if "$ref" in node:
        yield "a section"
        return
    if "enum" in node or "const" in node:
        yield from (f"`{value}`" for value in node.get("enum", [node.get("const")]))
        return
    match node.get("type"):
        case "integer" | "number" as kind:
            yield " ".join(["whole number" if kind == "integer" else "number", *_bounds(node)])
        case "string" if "pattern" in node:
            yield f"text like `{node['pattern']}`"
        case "string" if node.get("maxLength") == 1:
            yield "one character"
        case "string":
            yield "text (not empty)" if node.get("minLength") else "text"
        case "boolean":
            yield from ("`true`", "`false`")
        case "null":
            yield "`null`"
        case "array":
            entries = _values(node["items"]).replace("a section", "sections") if node.get("items") else ""
            yield f"list{_length(node)}{f' of {entries}' if entries else ''}"
        case "object" if isinstance(node.get("additionalProperties"), dict):
            yield f"map to {_values(node['additionalProperties'])}"
        case _:
            yield "any value"


def _bounds(node: Node) -> Iterator[str]:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    if given := [f"{word} {_number(node[rule])}" for rule, word in words.items() if rule in node]:
        yield f"({', '.join(given)})"


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _length(node: Node) -> str:
    low, high = node.get("minItems", 0), node.get("maxItems")
    if high is not None:
        return f" ({low})" if low == high else f" (from {low} to {high})"
    return f" (at least {low})" if low else ""

"""Files generated from the specification are up to date and complete."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec import load_spec
from orchestrator.spec.manual.every_field import print_every_field
from orchestrator.spec.manual.files import generated_files
from orchestrator.spec.manual.reference import print_reference
from orchestrator.spec.manual.schema import spec_schema
from orchestrator.spec.manual.tree import read_tree

ROOT = Path(__file__).parents[4]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "experiments" / "every-field.yaml"

SCHEMA: dict[str, Any] = {
    "properties": {
        "side": {
            "discriminator": {"propertyName": "kind"},
            "oneOf": [{"$ref": "#/$defs/Left"}, {"$ref": "#/$defs/Right"}],
            "default": {"kind": "right", "weight": 0.5},
        },
        "more": {"type": "array", "items": {"$ref": "#/$defs/Left"}, "default": [], "description": "Several."},
    },
    "$defs": {
        "Left": {
            "description": "The left one.",
            "properties": {
                "kind": {"const": "left", "default": "left", "description": "Tells it."},
                "size": {"type": "integer", "minimum": 1, "maximum": 3, "description": "Its size."},
            },
            "required": ["size"],
        },
        "Right": {
            "description": "The right one.",
            "properties": {
                "kind": {"const": "right", "default": "right", "description": "Tells it."},
                "weight": {"type": "number", "exclusiveMinimum": 0, "default": 0.5, "description": "Its weight."},
            },
        },
    },
}


@pytest.mark.parametrize("name", generated_files())
def test_generated_files_are_up_to_date(name: str) -> None:
    path = ROOT / name
    assert path.is_file(), "run `make manual`"
    assert not path.is_symlink(), "a checkout on Windows makes a text file of a symbolic link"
    assert path.read_text(encoding="utf-8") == generated_files()[name], "run `make manual`"


def test_the_reference_has_a_row_for_every_field() -> None:
    groups = [group for group in read_tree(spec_schema()).walk() if group.path]
    assert {"base", "data.held_out", "search.space.*", "tracking.wandb"} <= {group.path for group in groups}
    for group in groups:
        marks = ", ".join(f"{name}: {value}" for name, value in group.marks.items())
        _, _, rest = REFERENCE.partition(f"# `{group.path}`" + (f" with `{marks}`" if marks else ""))
        part, _, _ = rest.partition("\n#")
        assert group.sentence in part
        for field in group.fields:
            assert f"| `{field.name}` | " in part
    assert (
        "| `dropout` | number (at least 0, below 1) | `0.05` | Probability with which each input of the adapter"
        in REFERENCE
    )
    assert "| `model` | text (not empty) | required | Hub id" in REFERENCE
    assert '| `held_out` | a section | `{"share": 0.1}` |' in REFERENCE


def test_the_example_has_every_field_with_its_default() -> None:
    spec, text = load_spec(EXAMPLE), EXAMPLE.read_text(encoding="utf-8")
    least = ["lora", "training", "evaluation", "scheduler", "resources", "tracking", "output"]
    for section in least:
        value = getattr(spec, section)
        assert value == type(value)(), f"{section} has other values than its defaults"
        assert value.model_fields_set == set(type(value).model_fields), f"a field of {section} is missing"
    words = " ".join(text.replace("#", " ").split())
    for group in read_tree(spec_schema()).walk():
        for field in group.fields:
            if not field.parts and "*" not in group.path:
                assert " ".join(field.sentence.split()) in words


def test_each_member_of_a_union_is_shown() -> None:
    tree = read_tree(SCHEMA)
    assert [(group.path, group.marks) for group in tree.walk()] == [
        ("", {}),
        ("side", {"kind": "left"}),
        ("side", {"kind": "right"}),
        ("more[]", {}),
    ]
    reference = print_reference(tree)
    assert "## `side` with `kind: left`" in reference
    assert "| `size` | whole number (at least 1, at most 3) | required | Its size. |" in reference
    assert "## `side` with `kind: right`" in reference
    assert "## `more[]`" in reference


def test_the_example_shows_the_default_member_and_the_others_as_comments() -> None:
    side = read_tree({**SCHEMA, "properties": {"side": SCHEMA["properties"]["side"]}})
    lines = print_every_field(side).splitlines()
    assert lines[lines.index("side:") - 1] == "# The right one."
    assert "  kind: right" in lines
    assert "  weight: 0.5" in lines
    assert "  # Or: The left one." in lines
    assert [line.split() for line in lines if "kind: left" in line] == [["#", "kind:", "left", "#", "Tells", "it."]]

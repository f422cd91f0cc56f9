"""Every field declares who acts on it, and the source code keeps the declarations.

A field that nothing reads would pass every other check and be silently ignored.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

import orchestrator
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection, LoraSection, Section, TrainingSection
from orchestrator.spec.sections.honored import FAST_ONLY, TRL_ONLY, HonoredBy, honored_by

SECTIONS: dict[str, type[Section]] = {"base": BaseSection, "lora": LoraSection, "training": TrainingSection}
FIELDS = [
    pytest.param(section, name, id=f"{section}.{name}")
    for section, model in SECTIONS.items()
    for name in model.model_fields
]
PACKAGE = Path(orchestrator.__file__).parent


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_every_field_declares_who_honors_it(section: str, name: str) -> None:
    declared = honored_by(SECTIONS[section].model_fields[name])
    assert declared.fast or declared.trl or declared.orchestrator, "a field that nobody acts on is silently ignored"


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_who_is_declared_reads_the_field(section: str, name: str) -> None:
    declared = honored_by(SECTIONS[section].model_fields[name])
    readers = files_that_read(section, name)
    in_training = {file for file in readers if file.startswith("training/")}
    in_fast = {file for file in readers if file.startswith("training/fast/")}
    if declared.trl:
        assert in_training - in_fast, f"nothing in training/, outside fast/, reads {section}.{name}"
    if declared.fast:
        # Both engines share the code outside training/fast/; what only the fast engine honors must be read inside it.
        assert in_training if declared.trl else in_fast, f"nothing of the fast engine reads {section}.{name}"
    if declared.orchestrator:
        assert readers - in_fast, f"nothing outside spec/ and training/fast/ reads {section}.{name}"


def test_a_field_without_a_declaration_is_refused() -> None:
    with pytest.raises(ValueError, match="does not declare who honors it"):
        honored_by(FieldInfo(annotation=int))


@pytest.mark.parametrize(
    ("declared", "value", "is_supported"),
    [
        (HonoredBy(fast=True, trl=True), 5, True),
        (FAST_ONLY, 5, True),
        (TRL_ONLY, 5, False),
        (TRL_ONLY, 0, True),
        (HonoredBy(orchestrator=True), 5, True),
        (HonoredBy(fast=True, trl=True, fast_values=(0, 1)), 1, True),
        (HonoredBy(fast=True, trl=True, fast_values=(0, 1)), 5, False),
    ],
)
def test_the_fast_engine_supports_what_is_declared(declared: HonoredBy, value: int, is_supported: bool) -> None:
    assert declared.fast_supports(value, default=0) is is_supported


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_the_defaults_are_supported_by_the_fast_engine(section: str, name: str) -> None:
    info = SECTIONS[section].model_fields[name]
    assert info.is_required() or honored_by(info).fast_supports(info.default, info.default)


def test_a_field_that_only_trl_honors_keeps_a_trial_from_the_fast_engine() -> None:
    data = {"source": "embedded", "format": "prompt"}
    trial = TrialConfig.model_validate({"base": {"model": "embedded"}, "data": data, "training": {"loss": "dft"}})
    assert trial.fast_unsupported_reason() == "training.loss dft"


def files_that_read(section: str, name: str) -> set[str]:
    """Return the files outside spec/ that read a field, directly or through a method or property of its section."""
    reads = attribute_reads()
    through = {name, *(method for method, fields in fields_of_methods(SECTIONS[section]).items() if name in fields)}
    return {file for attribute in through for file in reads.get((section, attribute), set())}


@cache
def attribute_reads() -> dict[tuple[str, str], set[str]]:
    """Return (section, attribute) -> files that read `section.attribute` or `....section.attribute`."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith("spec/"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and (owner := owner_of(node)) in SECTIONS:
                found.setdefault((str(owner), node.attr), set()).add(name)
    return found


def owner_of(node: ast.Attribute) -> str | None:
    match node.value:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return None


@cache
def fields_of_methods(model: type[Section]) -> dict[str, set[str]]:
    """Return public method or property of a section -> fields that it reads."""
    file = PACKAGE.parent / Path(*model.__module__.split(".")).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        method.name: set(self_reads(method))
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef) and owner.name == model.__name__
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
    }


def self_reads(method: ast.FunctionDef) -> Iterator[Any]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr

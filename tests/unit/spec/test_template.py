"""Templates of rows: names of columns, optional columns, malformed templates."""

import pytest

from orchestrator.spec.template import (
    Block,
    Field,
    optional_columns,
    parse_template,
    template_columns,
    written_column,
)


def test_columns_in_their_order() -> None:
    assert template_columns("{{x}} {b} {a} {b}") == ["b", "a", "b"]
    assert parse_template("{{x}} {a}!") == ("{", "x", "}", " ", Field("a", False), "!")


@pytest.mark.parametrize("column", ["a b", "Q: text", "a.b[0]", "x!r", "ä", "Is it true?", "a??", "#", "1"])
def test_a_column_of_any_name_can_be_written_and_read(column: str) -> None:
    written = written_column(column)
    assert written is not None
    assert template_columns(f"{written} {{answer}}") == [column, "answer"]


@pytest.mark.parametrize("column", ["", "a{b", "a}", "a\nb", "?a", "/a"])
def test_names_that_cannot_be_written_in_a_template(column: str) -> None:
    assert written_column(column) is None


def test_optional_columns_and_blocks() -> None:
    template = "{q} {hint?}\n{?context}\n### Context:\n{context}\n\n{/context}\n{a}"
    assert template_columns(template) == ["q", "a"]
    assert optional_columns(template) == {"hint", "context"}
    block = Block("context", ("### Context:\n", Field("context", False), "\n\n"))
    assert parse_template(template) == (Field("q", False), " ", Field("hint", True), "\n", block, Field("a", False))
    inline = parse_template("{q}{?c} ({c}){/c} {a}")
    assert inline[1:3] == (Block("c", (" (", Field("c", False), ")")), " "), "marks within a line take nothing along"
    assert optional_columns("{a???} {b}") == {"a?"}


WRONG = {
    "{a": "a single '{' at character 1",
    "{b} a}": "a single '}' at character 6",
    "a": "has no field; write {column} fields",
    "{}": "a field has no name",
    "{q} {a?}": "a comes last, so it is the completion, which must not be optional",
    "{q}{?a} {a}{/a}": "a comes last",
    "{?c}{c} {a}": "{?c} has no end; write {/c} after its text",
    "{c}{/c} {a}": "{/c} ends no block; the innermost open one: none",
    "{?b}{?c}{/b}{/c} {a}": "{/b} ends no block; the innermost open one: c",
}


@pytest.mark.parametrize("template", WRONG)
def test_a_malformed_template_is_refused_with_the_place(template: str) -> None:
    with pytest.raises(ValueError, match=r"data\.template") as caught:
        parse_template(template)
    assert WRONG[template] in str(caught.value)

"""The documentation agrees with the code: commands, messages, links, terms and examples."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import orchestrator.errors
from orchestrator.cli import app
from orchestrator.errors import OrchestratorError
from orchestrator.spec import load_spec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = sorted((DOCS / "guide").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PLACEHOLDERS = r"\b(?:FILE|FOLDER|FIELD|NAME|VALUE|ADDRESS|N|M)\b"
"""Words of the troubleshooting page that stand for a value in a message."""
EXIT_CODES = {0, 1, 2, 3, 69, 74, 129, 130, 138, 143}


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_readme_has_at_most_900_words() -> None:
    assert len(README.split()) <= 900


def test_the_figures_of_the_readme_are_measured() -> None:
    bullets = README.partition("\n- **")[2].partition("\nSettings")[0]
    figures = re.findall(r"\d+(?:,\d{3}|\.\d+)%?", bullets.replace("1.1B", ""))
    assert len(figures) >= 6
    measured = read("benchmarks.md")
    assert [figure for figure in figures if figure not in measured] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_a_file_of_the_repository(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), target


def test_every_command_is_in_the_table_and_every_shown_command_exists() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    commands |= {group.name for group in app.registered_groups if group.name}
    assert (
        set(re.findall(r"^\| `([\w-]+)", read("guide/commands.md").partition("## Exit")[0], flags=re.MULTILINE))
        == commands
    )
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shown = [line for language in ("bash", "sh") for block in blocks(text, language) for line in block.splitlines()]
        named = {match[1] for line in shown if (match := re.match(r"orchestrator ([\w-]+)", line))}
        assert named <= commands, page.name


def test_the_shown_output_is_of_the_demo() -> None:
    (shown,) = [block for block in blocks(read("guide/commands.md"), "text") if "held-out prompts" in block]
    assert "best of 8" in shown
    assert "best adapter" in shown
    assert any("best of 8" in block for block in blocks(README, "text"))


def test_the_shown_search_is_valid(tmp_path: Path) -> None:
    (shown,) = [block for block in blocks(read("guide/search.md"), "yaml") if "search:" in block]
    demo = (ROOT / "experiments" / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "x.yaml").write_text(demo[: demo.index("search:")] + shown)
    spec = load_spec(tmp_path / "x.yaml")
    assert spec.search.first
    assert spec.search.budget.tokens == 50_000_000


def test_the_experiment_of_the_readme_is_valid(tmp_path: Path) -> None:
    (shown,) = blocks(README, "yaml")
    (tmp_path / "x.yaml").write_text(shown)
    assert load_spec(tmp_path / "x.yaml").search.num_trials == 16


@pytest.mark.parametrize("page", ["choosing.md", "gpu-box.md", "cluster.md"])
def test_whole_experiments_of_a_page_are_valid(page: str, tmp_path: Path) -> None:
    experiments = [
        block for block in blocks(read(page), "yaml") if block.startswith(("base:", "# ")) and "data:" in block
    ]
    for number, shown in enumerate(experiments):
        (tmp_path / f"{number}.yaml").write_text(shown)
        assert load_spec(tmp_path / f"{number}.yaml").search.space
    assert experiments or page == "cluster.md"


def test_troubleshooting_describes_every_error_class_and_exit_code() -> None:
    text = read("troubleshooting.md")
    raised = [value for value in vars(orchestrator.errors).values() if isinstance(value, type)]
    for error in (each for each in raised if issubclass(each, OrchestratorError)):
        assert f"`{error.__name__}`" in text, error.__name__
        assert getattr(error, "exit_code", 1) in EXIT_CODES
    for page in ("troubleshooting.md", "guide/commands.md"):
        assert {int(code) for code in re.findall(r"^\| (\d+) \|", read(page), flags=re.MULTILINE)} >= EXIT_CODES


def messages_of_the_code() -> str:
    """Return all string constants of the package except docstrings, one a line; `...` replaces f-string values."""
    found = []
    for path in sorted((ROOT / "orchestrator").rglob("*.py")):
        excluded: set[int] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Expr):
                excluded.add(id(node.value))
            elif isinstance(node, ast.JoinedStr):
                excluded.update(map(id, node.values))
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in excluded:
                found.append(node.value)
    return "\n".join(message.replace("\n", " ") for message in found)


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    messages = messages_of_the_code() + "\n" + (ROOT / "Makefile").read_text(encoding="utf-8")
    text = read("troubleshooting.md")
    tables = re.findall(r"^\| message \| cause \| what to do \|\n\| --- .*\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    cells = [row.split(" | ")[0].removeprefix("| ") for table in tables for row in table.splitlines()]
    assert len(cells) > 100
    assert [cell for cell in cells if not re.fullmatch(r"`[^`]+`(; `[^`]+`)*", cell)] == []
    phrases = [phrase for cell in cells for phrase in re.findall(r"`([^`]+)`", cell)]
    parts = {phrase: re.split(PLACEHOLDERS, phrase) for phrase in phrases}
    assert [phrase for phrase in phrases if max(map(len, parts[phrase])) < 8] == []  # too short to find a message
    value = rf"(?:\.\.\.|{PLACEHOLDERS})"
    patterns = {phrase: value.join(map(re.escape, parts[phrase])) for phrase in phrases}
    assert [phrase for phrase in phrases if not re.search(patterns[phrase], messages)] == []


def test_troubleshooting_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = read("troubleshooting.md")
    assert [extra for extra in project["optional-dependencies"] if f"`{extra}`" not in text] == []


def test_the_glossary_is_sorted_and_has_each_term_once() -> None:
    terms = re.findall(r"^\*\*([^*]+)\*\*", read("glossary.md"), flags=re.MULTILINE)
    assert len(terms) >= 30
    assert terms == sorted(set(terms), key=str.lower)


def test_decisions_are_numbered_and_listed() -> None:
    files = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
    assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))
    index = read("decisions/index.md")
    for name in files:
        assert f"]({name})" in index
        headings = re.findall(r"^## (.*)", read(f"decisions/{name}"), flags=re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences"], name


def test_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:orchestrator|tests|docs|scripts|benchmarks|experiments)/[\w./-]+)`", text)
    assert len(named) > 40
    assert not {path for path in named if not (ROOT / path).exists()}
    contracts = re.findall(r'contract\s+"([^"]+)"', text)
    assert len(contracts) > 1
    assert not {name for name in contracts if f'name = "{name}"' not in (ROOT / "pyproject.toml").read_text()}


def test_architecture_names_tests_that_exist() -> None:
    text = read("architecture.md")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    files = {path.name for path in (ROOT / "tests").rglob("*.py")}
    functions = set(re.findall(r"`(test_\w+)`", text))
    assert len(functions) > 20
    assert not {name for name in functions if f"def {name}(" not in code}
    assert not {name for name in re.findall(r"`(?:tests/[\w/]*)?(test_\w+\.py)`", text) if name not in files}

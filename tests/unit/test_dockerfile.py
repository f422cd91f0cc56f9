"""The structure of the Dockerfile. No image was built: a test without Docker cannot show that it builds."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def instructions() -> list[tuple[str, str]]:
    """Instructions in their order, each with its arguments in one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for line in lines if line for name, _, rest in [line.partition(" ")]]


def of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for each, arguments in instructions if each == name]


def test_instructions_are_dockers(instructions: list[tuple[str, str]]) -> None:
    known = {"FROM", "RUN", "USER", "WORKDIR", "ENV", "ARG", "COPY", "CMD"}
    assert {name for name, _ in instructions} == known
    assert instructions[0] == ("FROM", "python:3.12-slim")


def test_python_is_a_supported_version(instructions: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    minor = int(instructions[0][1].split(":3.")[1].split("-")[0])
    assert minor >= int(project["requires-python"].removeprefix(">=3."))


def test_copied_files_exist_and_suffice_to_install(instructions: list[tuple[str, str]]) -> None:
    copied = []
    for arguments in of(instructions, "COPY"):
        *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
        copied += sources
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {"orchestrator", "pyproject.toml", "README.md", "constraints.txt", "experiments"} <= set(copied)


def test_versions_are_exact(instructions: list[tuple[str, str]]) -> None:
    (install,) = [command for command in of(instructions, "RUN") if "pip install" in command]
    assert "-c constraints.txt" in install
    assert '"ray[default]"' in install  # Ray's dashboard serves jobs, and its autoscaler
    assert "ray==" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_it_does_not_run_as_root(instructions: list[tuple[str, str]]) -> None:
    (user,) = of(instructions, "USER")
    assert any(f"useradd --uid 1000 --create-home {user}" in command for command in of(instructions, "RUN"))
    later = instructions[[name for name, _ in instructions].index("USER") :]
    assert any("pip install" in arguments for _, arguments in later)
    assert not any("apt-get" in arguments for _, arguments in later)


def test_no_key_is_baked_in(instructions: list[tuple[str, str]]) -> None:
    written = " ".join(of(instructions, "ENV") + of(instructions, "ARG"))
    assert not re.search(r"TOKEN|KEY|PASSWORD|SECRET", written)

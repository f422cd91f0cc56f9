"""The README's commands and Python, run in order in a clone's place; its `sh` blocks need make, a cluster or a hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import app
from orchestrator.spec import load_spec

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_commands_and_python_run_in_order(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for language, block in BLOCKS:
        if language not in ("bash", "python"):
            continue
        command = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran == 13
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_every_verb_is_in_the_table_and_every_command_is_a_verb() -> None:
    verbs = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"^\| `(\w+)", TEXT, flags=re.MULTILINE)) == verbs
    assert set(re.findall(r"orchestrator (check|trial|sweep|\w+) (?:[a-z]+/|first|adapter)", TEXT)) <= verbs


def test_the_shown_output_is_of_the_demo() -> None:
    (shown,) = [block for _, block in BLOCKS if "held-out prompts" in block]
    assert "best of 8" in shown
    assert "best adapter" in shown


def test_the_search_that_is_shown_is_one(tmp_path: Path) -> None:
    (shown,) = [block for language, block in BLOCKS if language == "yaml" and "search:" in block]
    demo = (ROOT / "experiments" / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "x.yaml").write_text(demo[: demo.index("search:")] + shown)
    spec = load_spec(tmp_path / "x.yaml")
    assert spec.search.first
    assert spec.search.budget.tokens == 50_000_000


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target

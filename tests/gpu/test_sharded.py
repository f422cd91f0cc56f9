"""A base in pieces on two GPUs computes what a whole one does. Its processes choose their GPUs themselves."""

import json
import shutil
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def num_gpus() -> int:
    """Count the GPUs of the machine; this process sees one of them (`conftest`)."""
    if shutil.which("nvidia-smi") is None:
        return 0
    return len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.splitlines())


@pytest.mark.skipif(num_gpus() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does_with_half_of_the_layers_each() -> None:
    command = [sys.executable, "-m", "benchmarks.sharded", "1.1b", "--ranks", "2", "--compare", "--steps", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    assert figures["largest_relative_difference_of_losses"] < 0.005
    for rank in figures["pieces"]:
        assert rank["losses"][-1] < rank["losses"][0]
        assert rank["base_gib"] < 0.75 * figures["whole"][0]["base_gib"], "embeddings and head are not cut"

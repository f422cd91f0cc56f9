"""A base in pieces: several processes compute, to the bit, what each would on a whole base."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.training.fast.shard.gatherer import FORWARD, TRAIN, _layers
from orchestrator.training.fast.shard.layout import ALIGNMENT, LayerLayout

PROCESS = Path(__file__).parent / "shard_process.py"


class Started:
    """A process of `shard_process.py`."""

    def __init__(self, folder: Path, rank: int, num_ranks: int, steps: int, evaluations: int) -> None:
        self.output = folder / f"{num_ranks}-{rank}.json"
        self.log = (folder / f"{num_ranks}-{rank}.log").open("w")
        numbers = [str(each) for each in (rank, num_ranks)]
        command = [sys.executable, str(PROCESS), *numbers, str(folder / "port"), str(steps), str(evaluations)]
        self.process = subprocess.Popen(
            [*command, str(self.output)], stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT
        )

    def measured(self) -> dict[str, Any]:
        deadline = time.monotonic() + 400
        while not self.output.exists() or not self.output.read_text():
            assert self.process.poll() is None or self.output.exists(), Path(self.log.name).read_text()
            assert time.monotonic() < deadline, Path(self.log.name).read_text()
            time.sleep(0.05)
        found: dict[str, Any] = json.loads(self.output.read_text())
        return found

    def end(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        assert self.process.wait(60) == 0, Path(self.log.name).read_text()


WORK = {0: (3, 2), 1: (5, 0)}
"""Rank -> its steps and evaluations. The ranks do different numbers of either, so that each also joins alone."""


@pytest.mark.slow
def test_two_processes_compute_the_same_bits_as_one(tmp_path: Path) -> None:
    alone = []
    for rank, work in WORK.items():
        started = Started(tmp_path, rank, 0, *work)
        alone.append(started.measured())
        started.end()
    group = [Started(tmp_path, rank, 2, *work) for rank, work in WORK.items()]
    together = [each.measured() for each in group]
    for each in group:
        each.end()
    for one, other in zip(alone, together, strict=True):
        whole, held = one.pop("layer_bytes"), other.pop("layer_bytes")
        assert one["losses"][0] != one["losses"][-1]
        assert one == other
        assert 0.5 <= held / whole < 0.55, "padding aside, half of the layers' weights"


@pytest.mark.slow
def test_a_process_whose_group_has_lost_another_says_so(tmp_path: Path) -> None:
    group = [Started(tmp_path, rank, 2, steps, 0) for rank, steps in ((0, 100_000), (1, 1))]
    group[1].measured()
    group[1].process.kill()
    assert group[0].process.wait(60) == 1
    group[0].log.flush()
    assert "resources.strategy shard: another process of the group is gone" in Path(group[0].log.name).read_text()
    group[1].process.wait()


def test_a_layer_is_whole_again_when_its_pieces_are_joined() -> None:
    tensors = [torch.arange(700, dtype=torch.uint8), torch.randn(33, 7), torch.randn(5).to(torch.bfloat16)]
    layout = LayerLayout(tensors, 3)
    assert layout.num_bytes == 3 * layout.shard_bytes
    assert layout.shard_bytes % ALIGNMENT == 0
    whole = torch.cat([layout.shard(tensors, rank) for rank in range(3)])
    assert all(torch.equal(view, tensor) for view, tensor in zip(layout.views(whole), tensors, strict=True))


def test_the_last_layer_of_a_forward_is_not_gathered_again() -> None:
    assert _layers(FORWARD, 3) == [0, 1, 2]
    assert _layers(TRAIN, 3) == [0, 1, 2, 1, 0]
    assert _layers(TRAIN, 1) == [0]

"""Random values, tolerances and adapters in float64 for the tests of `reference`."""

import torch

from orchestrator.training.fast.step.adapters import AdaptedLayer, Adapters

FLOAT = 1e-6
"""Largest difference relative to the norm, where a part is computed in float32."""
DOUBLE = 1e-12
"""The same where all is computed in float64."""

GROUPS = {
    "all of three": [AdaptedLayer("q", 4, 24, 0, 12), AdaptedLayer("k", 5, 24, 12, 8), AdaptedLayer("v", 6, 24, 20, 8)],
    "two of three": [AdaptedLayer("q", 11, 24, 0, 12), AdaptedLayer("v", 13, 24, 20, 8)],
    "one": [AdaptedLayer("down", 20, 24, 0, 28)],
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(value: torch.Tensor, exact: torch.Tensor, tolerance: float = FLOAT) -> None:
    assert value.shape == exact.shape
    value, exact = value.detach().double(), exact.detach().double()
    error = float((value - exact).norm() / exact.norm())
    assert error <= tolerance, f"the difference is {error:.2e} of the norm"


def make_adapters(num_slots: int, layers: list[AdaptedLayer], rank: int = 4) -> Adapters:
    adapters = Adapters([layers], num_slots, rank, torch.float64, torch.float64, torch.device("cpu"))
    adapters.weights.normal_()
    return adapters

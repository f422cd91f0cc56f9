"""Adapters of experts: LoRA (arXiv 2106.09685) on one matrix of all experts of a layer, for the rows of all slots.

Each expert has an A and a B of its own in each slot. Rows are sorted by expert, and those of an expert by slot, so that
one grouped product serves all experts and slots (2 slots, 3 experts):

    expert   0  0  0  1  1  2           group = expert * slots + slot
    slot     0  1  1  0  0  1
    ends     1  3  5  5  5  6           one for each group; groups 3 and 4 have no row

A gradient is a grouped product too, whose groups divide the dimension that is summed over. Where groups end is data, so
that a CUDA graph does not depend on the routing. A pass's gradient has the compute dtype before it is added to the
float32 one. There is no dropout: PEFT 0.21 refuses it here (`ParamWrapper`).
"""

import torch
import torch.nn.functional as F

from orchestrator.training.fast.sizes import MAX_GROUPS
from orchestrator.training.fast.step.adapters import Adapters, LayerGroup


class ExpertAdapters:
    """The adapters of one matrix of all experts, in the compute dtype, for the products of one pass."""

    def __init__(self, adapters: Adapters, group: LayerGroup, ends: torch.Tensor, scales: torch.Tensor) -> None:
        """Convert the weights.

        Args:
            adapters: of all slots.
            group: the matrix.
            ends: (groups,) int32, the end of each group's rows.
            scales: (rows,) float32 scale of each row's slot in this matrix.
        """
        self._adapters, self._group, self._ends, self._scales = adapters, group, ends, scales
        a, b = adapters.expert_a(group, adapters.weights), adapters.expert_b(group, adapters.weights)
        self._a, self._b = (_by_group(each, adapters.compute_dtype) for each in (a, b))

    def forward(self, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Add the update to the products of the base, y (rows, out), in place.

        Returns:
            (rows, R) between A and B, scaled, for the backward.
        """
        hidden = _scaled(grouped_product(rows.to(self._a.dtype), self._a.mT, self._ends), self._scales)
        y += grouped_product(hidden, self._b.mT, self._ends)
        return hidden

    def backward(
        self,
        dy: torch.Tensor,
        rows: torch.Tensor,
        hidden: torch.Tensor,
        dx: torch.Tensor,
        factors: torch.Tensor | None = None,
    ) -> None:
        """Add to the gradients of A and B, and to `dx`, in place.

        Args:
            dy: (rows, out) gradient of the products.
            rows: (rows, in) input of the products.
            hidden: (rows, R) from `forward`.
            dx: (rows, in) gradient that has come through the base for this `dy`.
            factors: (rows,) float32 by which `dy` must be multiplied for the gradients of A and B; None for 1.
        """
        adapters, group, dtype = self._adapters, self._group, self._a.dtype
        dy, rows = dy.to(dtype), rows.to(dtype)
        dhidden = _scaled(grouped_product(dy, self._b, self._ends), self._scales)
        dx += grouped_product(dhidden, self._a, self._ends)
        if factors is not None:
            hidden, dhidden = _scaled(hidden, factors), _scaled(dhidden, factors)
        for gradients, left, right in (
            (adapters.expert_a(group, adapters.gradients), dhidden, rows),
            (adapters.expert_b(group, adapters.gradients), dy, hidden),
        ):
            # Without a name for the sums: one that is kept would exist beside the next.
            by_group = group.num_matrices, adapters.num_slots
            gradients += grouped_sum(left, right, self._ends).unflatten(0, by_group).transpose(0, 1)


def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply the rows of each group by its matrix.

    Args:
        rows: (rows, m), sorted by group.
        matrices: (groups, m, n).
        ends: (groups,) int32, the end of each group's rows. The last one is the number of rows.

    Returns:
        (rows, n).
    """
    product = F.grouped_mm(rows, matrices[:MAX_GROUPS], offs=ends[:MAX_GROUPS])
    if len(ends) > MAX_GROUPS:
        row = torch.arange(len(rows), device=rows.device)[:, None]
        for part in _further_parts(len(ends)):
            later = F.grouped_mm(rows, matrices[part], offs=ends[part])
            torch.where(row < ends[part.start], product, later, out=product)
    return product


def grouped_sum(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Compute x^T y over the rows of each group: (rows, m), (rows, n) -> (groups, m, n); 0 for a group without rows."""
    sums = [F.grouped_mm(x.mT, y, offs=ends[:MAX_GROUPS])]
    sums += [F.grouped_mm(x.mT, y, offs=ends[part])[1:] for part in _further_parts(len(ends))]
    # On GPUs of compute capability 10.x, groups without rows may get other values (pytorch issue 172439).
    has_no_rows = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).masked_fill_(has_no_rows[:, None, None], 0)


def _further_parts(groups: int) -> list[slice]:
    """Return the parts after the first `MAX_GROUPS` groups.

    Each begins with a group of the part before it. A product takes all earlier rows for rows of that group, because the
    first group begins at row 0; its results are not used.
    """
    return [
        slice(start - 1, min(start - 1 + MAX_GROUPS, groups)) for start in range(MAX_GROUPS, groups, MAX_GROUPS - 1)
    ]


def _by_group(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reorder weights (S, experts, m, n) by group: (experts * S, m, n)."""
    return weights.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def _scaled(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiply each row by a factor: (rows, n), (rows,) float32 -> (rows, n)."""
    return (rows * factors[:, None]).to(rows.dtype)

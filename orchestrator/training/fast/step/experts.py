"""Experts in place of a layer's MLP (mixture of experts, arXiv 1701.06538): a router sends each token to some.

The rows of all experts lie one after another, sorted by expert, so that one grouped product serves all experts. Shapes
do not depend on where tokens go, so that the pass can be a CUDA graph:

    token      0  0  1  1  2  2         K experts for each of T tokens
    expert     3  1  0  3  1  3
    sorted     0 | 1  1 | 3  3  3       rows of the grouped products, (T K)
    ends       1   3   3  6             one for each expert; expert 2 has no token

Router and base are frozen; the matrices of the experts may have adapters (`expert_adapters`), for which the rows of an
expert are sorted by slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from orchestrator.training.fast.families.family import Family
from orchestrator.training.fast.families.settings import Settings
from orchestrator.training.fast.step.adapters import LayerGroup
from orchestrator.training.fast.step.expert_adapters import ExpertAdapters
from orchestrator.training.fast.step.modules import ExpertMatrices
from orchestrator.training.fast.step.pass_inputs import PassInputs


@dataclass(frozen=True)
class Routing:
    """Which experts compute each token. T tokens, K experts for each of them, E experts."""

    scores: torch.Tensor
    """(T, K) float32: factors of the outputs of a token's experts."""
    chosen: torch.Tensor
    """(T, K) experts of each token."""
    tokens: torch.Tensor
    """(T K,) token of each row."""
    places: torch.Tensor
    """(T K,) row of each expert of each token."""
    ends: torch.Tensor
    """(E,) int32: end of each expert's rows."""
    slot_ends: torch.Tensor
    """(E S,) int32: end of the rows of each expert and slot."""
    slots: torch.Tensor
    """(T K,) int32: slot of each row."""


@dataclass(frozen=True)
class SavedExperts:
    """Activations that the forward leaves for the backward. Rows are those of the grouped products."""

    routing: Routing
    gate_up: torch.Tensor
    """(T K, 2 I)."""
    hidden: torch.Tensor | None
    """(T K, I) after the activation. May be computed again."""
    gate_up_lora: torch.Tensor | None
    """(T K, R) between A and B; None where the matrix is not adapted."""
    down_lora: torch.Tensor | None
    """(T K, R)."""


class Experts:
    """The router and the experts of a decoder layer."""

    def __init__(self, layer: Any, family: Family, settings: Settings, dtype: torch.dtype, keeps_base: bool) -> None:
        """Take the weights of a transformers decoder layer; arguments as in `Layer`."""
        names = family.experts
        assert names is not None
        router, experts = layer.get_submodule(names.router), layer.get_submodule(names.experts)
        self._router = router.weight.detach().to(dtype)
        self._router_bias = router.bias.detach().to(dtype) if names.has_biases else None
        self._gate_up, self._down = (
            ExpertMatrices(experts, name, names, dtype, keeps_base) for name in ("gate_up_proj", "down_proj")
        )
        self._scores = names.scores
        self._normalizes = settings.normalizes_scores
        self._count = settings.experts_per_token
        self._activation = family.activation
        self.given: torch.Tensor | None = None
        """(tokens, K) choices for the first tokens in place of the router's own; None for none."""
        self.agreement = torch.ones(())
        """Share of the router's own choices that were among the given ones, in the last pass that had any."""

    def forward(
        self, x: torch.Tensor, inputs: PassInputs, groups: Sequence[LayerGroup | None]
    ) -> tuple[torch.Tensor, SavedExperts]:
        gate_up_group, down_group = groups
        routing = self._route(x, inputs)
        gate_up, gate_up_lora = _products(self._gate_up, x[routing.tokens], routing, inputs, gate_up_group)
        hidden = inputs.ops.glu(gate_up, self._activation)
        rows, down_lora = _products(self._down, hidden, routing, inputs, down_group)
        outputs = rows[routing.places].unflatten(0, routing.scores.shape)
        y = torch.bmm(routing.scores.to(outputs.dtype)[:, None], outputs)[:, 0]
        kept = hidden if inputs.saves_elementwise else None
        return y, SavedExperts(routing, gate_up, kept, gate_up_lora, down_lora)

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        saved: SavedExperts,
        inputs: PassInputs,
        groups: Sequence[LayerGroup | None],
    ) -> torch.Tensor:
        gate_up_group, down_group = groups
        routing = saved.routing
        hidden = inputs.ops.glu(saved.gate_up, self._activation) if saved.hidden is None else saved.hidden
        row_scores = torch.empty_like(routing.scores).flatten().scatter_(0, routing.places, routing.scores.flatten())
        # <dy, W hidden> is <W^T dy, hidden>: the product serves the scores' gradient and, scaled, that of `hidden`.
        unscaled = _products_backward(
            self._down, dy[routing.tokens], hidden, saved.down_lora, routing, inputs, down_group, row_scores
        )
        dscores = (unscaled.float() * hidden).sum(1)[routing.places].unflatten(0, routing.scores.shape)
        if self._down.bias is not None:
            dscores = dscores + (dy @ self._down.bias.T).float().gather(1, routing.chosen)
        dhidden = (unscaled * row_scores[:, None]).to(dy.dtype)
        dgate_up = inputs.ops.glu_backward(dhidden, saved.gate_up, self._activation)
        rows = x[routing.tokens] if gate_up_group is not None else None
        rows = _products_backward(self._gate_up, dgate_up, rows, saved.gate_up_lora, routing, inputs, gate_up_group)
        dx = rows[routing.places].unflatten(0, routing.scores.shape).sum(1)
        return dx + self._route_backward(dscores, x, routing).to(dy.dtype) @ self._router

    def scores_of(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the scores (T, K) in float32 of chosen experts (T, K), from the router's logits (T, E)."""
        if self._scores == "chosen":
            return logits.gather(1, chosen).softmax(-1, torch.float32)
        scores = logits.softmax(-1, torch.float32).gather(1, chosen)
        return scores / scores.sum(-1, keepdim=True) if self._normalizes else scores

    def _route(self, x: torch.Tensor, inputs: PassInputs) -> Routing:
        """Choose the experts of each token, as the routers of transformers do."""
        logits = self._logits(x)
        # Where scores are equal, the same experts must be chosen as in transformers: by the same operation on them.
        chosen = (logits if self._scores == "chosen" else logits.softmax(-1, torch.float32)).topk(self._count).indices
        if self.given is not None:
            own = chosen[: len(self.given)]
            self.agreement = (own[:, :, None] == self.given[:, None]).any(-1).float().mean()
            own.copy_(self.given)
        batch, num_slots = inputs.batch, inputs.adapters.num_slots
        # Not `batch.slot_ids`, which is kept: on a GPU the next batch has other slots in the same tensors.
        slots = batch.tile_slots.long()[:, None].expand(-1, batch.tile).reshape(-1, 1)
        groups, order = (chosen * num_slots + slots).flatten().sort(stable=True)
        numbers = torch.arange(len(self._router) * num_slots, device=x.device)
        slot_ends = torch.searchsorted(groups, numbers, right=True).int()
        ends = slot_ends[num_slots - 1 :: num_slots].contiguous()
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        scores = self.scores_of(logits, chosen)
        return Routing(scores, chosen, order // self._count, places, ends, slot_ends, (groups % num_slots).int())

    def _route_backward(self, dscores: torch.Tensor, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Compute the gradient of the router's logits (T, E) from that of the scores (T, K), both float32."""
        weighted = dscores * routing.scores
        total = weighted.sum(1, keepdim=True)
        dlogits = dscores.new_zeros(len(dscores), len(self._router))
        if self._normalizes:  # the softmax over the chosen experts alone
            return dlogits.scatter_(1, routing.chosen, weighted - routing.scores * total)
        return dlogits.scatter_(1, routing.chosen, weighted) - self._logits(x).softmax(-1, torch.float32) * total

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the router's logits, (T, E)."""
        return F.linear(x, self._router, self._router_bias)


def _products(
    matrices: ExpertMatrices, rows: torch.Tensor, routing: Routing, inputs: PassInputs, group: LayerGroup | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multiply rows (T K, in) by the matrices of their experts, and by the adapters: (T K, out), and (T K, R)."""
    products = matrices.forward(rows, routing.ends)
    if group is None:
        return products, None
    return products, _adapters(routing, inputs, group).forward(products, rows)


def _products_backward(
    matrices: ExpertMatrices,
    dy: torch.Tensor,
    rows: torch.Tensor | None,
    lora_hidden: torch.Tensor | None,
    routing: Routing,
    inputs: PassInputs,
    group: LayerGroup | None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the gradient of the rows (T K, in) from that of the products (T K, out), and add to the adapters'.

    Args:
        matrices: of the base.
        dy: gradient of the products.
        rows: input of the products; needed where they have adapters.
        lora_hidden: (T K, R) from `_products`.
        routing: of the pass.
        inputs: of the pass.
        group: adapters of the matrices.
        factors: (T K,) by which `dy` must be multiplied for the gradients of the adapters; None for 1.
    """
    dx = matrices.backward(dy, routing.ends)
    if group is not None and rows is not None and lora_hidden is not None:
        _adapters(routing, inputs, group).backward(dy, rows, lora_hidden, dx, factors)
    return dx


def _adapters(routing: Routing, inputs: PassInputs, group: LayerGroup) -> ExpertAdapters:
    scales = inputs.batch.table["scale"] * inputs.adapters.factors[group.first_layer]
    return ExpertAdapters(inputs.adapters, group, routing.slot_ends, scales[routing.slots])

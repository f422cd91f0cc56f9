"""One trial's part of an engine's adapters: the LoRA matrices of its slot, and an optimizer's state for them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._utils import _unflatten_dense_tensors

from orchestrator.training.fast.ops.eight_bit import Moment
from orchestrator.training.fast.step.adapters import Adapters


class SlotView:
    """One trial's view of a slot: its LoRA matrices and optimizer state.

    Slots are reused; each trial gets its own view.
    """

    def __init__(self, adapters: Adapters, slot: int, rank: int, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """
        Args:
            adapters: the adapters of all slots.
            slot: number of the trial's slot.
            rank: largest rank of the layers of the trial's adapter.
            parameters: LoRA parameters of the trial's model, by the names of `Adapters.matrices`.
        """
        self._adapters = adapters
        self._slot = slot
        self._rank = rank
        self._parameters = parameters
        self._views: dict[int, dict[str, torch.Tensor]] = {}

    def matrices(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of one of the flat tensors, by the names of the parameters. They are made once."""
        if (known := self._views.get(id(flat))) is None:
            every = self._adapters.matrices(self._slot, self._rank, flat)
            known = self._views[id(flat)] = {name: matrix for name, matrix in every if name in self._parameters}
        return known

    def load(self, flat: torch.Tensor, name: str, values: torch.Tensor) -> None:
        """Copy values in the shape of a parameter into one of the flat tensors."""
        matrix = self.matrices(flat)[name]
        matrix.copy_(values.reshape(matrix.shape))

    def on_host(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the matrices in the shapes of the parameters, copied to the host.

        They lie one after another in storage that holds nothing else. Saving a view writes its whole storage, and an
        adapter of rank 8 is an eighth of a stack of rank 64.
        """
        matrices = self.matrices(flat)
        like = list(matrices.values())
        packed = torch.empty(sum(matrix.numel() for matrix in like), dtype=flat.dtype, device=flat.device)
        torch._foreach_copy_(_unflatten_dense_tensors(packed, like), like)
        copies = zip(matrices, _unflatten_dense_tensors(_to_host(packed), like), strict=True)
        return {name: copy.view(self._parameters[name].shape) for name, copy in copies}

    def optimizer_states(self, steps: int, of_bitsandbytes: bool) -> dict[torch.nn.Parameter, dict[str, Any]]:
        """Return the optimizer's present state, on the host, in the form of the trial's own optimizer.

        Args:
            steps: number of steps that the optimizer has made.
            of_bitsandbytes: whether the optimizer is bitsandbytes' rather than torch's. Moments in eight bits always
                belong to bitsandbytes.
        """
        adapters = self._adapters
        states: dict[str, dict[str, Any]]
        if adapters.eight_bit is not None:
            moments = {name: pair for name, pair in self._in_eight_bits() if name in self._parameters}
            states = {
                name: pair[0].state(1, self._parameters[name].shape) | pair[1].state(2, self._parameters[name].shape)
                for name, pair in zip(moments, copied(list(moments.values())), strict=True)
            }
        else:
            first, second = _moment_names(of_bitsandbytes)
            moment1, moment2 = self.on_host(adapters.moment1), self.on_host(adapters.moment2)
            states = {name: {first: moment1[name], second: moment2[name]} for name in self._parameters}
        for state in states.values():
            state["step"] = steps if of_bitsandbytes else torch.tensor(float(steps))  # torch increments it in place
        return {self._parameters[name]: state for name, state in states.items()}

    def load_optimizer_states(self, states: Mapping[torch.nn.Parameter, dict[str, Any]]) -> int:
        """Load the optimizer's state from a checkpoint into the slot, which must have been cleared.

        Returns:
            Number of steps that the optimizer has made: 0 where there is no state.
        """
        adapters = self._adapters
        found = {name: states[parameter] for name, parameter in self._parameters.items() if parameter in states}
        if adapters.eight_bit is not None:
            for name, pair in self._in_eight_bits():
                if name in found:
                    for number, moment in enumerate(pair, 1):
                        moment.load(number, found[name])
        else:
            for name, state in found.items():
                keys = _moment_names("state1" in state)
                for flat, key in zip((adapters.moment1, adapters.moment2), keys, strict=True):
                    self.load(flat, name, state[key])
        return max((int(state["step"]) for state in found.values()), default=0)

    def _in_eight_bits(self) -> Iterator[tuple[str, tuple[Moment, Moment]]]:
        return self._adapters.eight_bit_moments(self._slot, self._rank)


def _moment_names(of_bitsandbytes: bool) -> Sequence[str]:
    """Return the keys of AdamW's two moments in an optimizer's state."""
    return ("state1", "state2") if of_bitsandbytes else ("exp_avg", "exp_avg_sq")


def copied(pairs: Sequence[tuple[Moment, Moment]]) -> Iterator[tuple[Moment, Moment]]:
    """Yield copies of 8-bit moments on the host, in tensors that later steps do not change."""
    every = [moment for pair in pairs for moment in pair]
    parts = _split_on_host([moment.bytes for moment in every])
    absmax = _split_on_host([moment.absmax for moment in every if moment.absmax is not None])
    codes = [moment.code.cpu() for moment in pairs[0]]
    for pair in pairs:
        first, second = (
            Moment(next(parts), None if moment.absmax is None else next(absmax), values)
            for moment, values in zip(pair, codes, strict=True)
        )
        yield first, second


def _split_on_host(parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Copy flat tensors of one dtype to the host in one transfer, and yield them there."""
    if not parts:
        return iter(())
    return iter(_to_host(torch.cat(list(parts))).split([len(part) for part in parts]))


def _to_host(packed: torch.Tensor) -> torch.Tensor:
    """Copy a tensor through pinned memory, the fastest way from a GPU. On the CPU, return the tensor itself."""
    return torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True).copy_(packed) if packed.is_cuda else packed

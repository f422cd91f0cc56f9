"""What of an engine's adapters is one trial's own: the matrices of its slot, and an optimizer's state for them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._utils import _unflatten_dense_tensors

from orchestrator.training.fast.ops.eight_bit import Moment
from orchestrator.training.fast.step.adapters import Adapters


class SlotView:
    """Of a slot that several trials have one after another: each has one of these."""

    def __init__(self, adapters: Adapters, slot: int, rank: int, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """
        Args:
            adapters: of all slots.
            slot: the trial's.
            rank: of its adapter.
            parameters: of its model, by the names of `Adapters.matrices`.
        """
        self._adapters = adapters
        self._slot = slot
        self._rank = rank
        self._parameters = parameters
        self._views: dict[int, dict[str, torch.Tensor]] = {}

    def matrices(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """By the names of the parameters: views of one of the flat tensors, made once."""
        if (known := self._views.get(id(flat))) is None:
            every = self._adapters.matrices(self._slot, self._rank, flat)
            known = self._views[id(flat)] = {name: matrix for name, matrix in every if name in self._parameters}
        return known

    def at_home(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same, copied to the host: one after another, in storage that holds nothing else.

        A file holds all that lies behind a tensor, and of a stack of rank 64 an adapter of rank 8 is an eighth.
        """
        matrices = self.matrices(flat)
        like = list(matrices.values())
        packed = torch.empty(sum(matrix.numel() for matrix in like), dtype=flat.dtype, device=flat.device)
        torch._foreach_copy_(_unflatten_dense_tensors(packed, like), like)
        return dict(zip(matrices, _unflatten_dense_tensors(_to_host(packed), like), strict=True))

    def states(self, steps: int, of_bitsandbytes: bool) -> dict[torch.nn.Parameter, dict[str, Any]]:
        """The optimizer's state now, on the host, as the trial's own optimizer would have it.

        Args:
            steps: that it has made.
            of_bitsandbytes: whether it is bitsandbytes', which has other names than torch's; in eight bits it is.
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
            first, second = _names(of_bitsandbytes)
            moment1, moment2 = self.at_home(adapters.moment1), self.at_home(adapters.moment2)
            states = {name: {first: moment1[name], second: moment2[name]} for name in self._parameters}
        for state in states.values():
            state["step"] = steps if of_bitsandbytes else torch.tensor(float(steps))  # torch's counts in place
        return {self._parameters[name]: state for name, state in states.items()}

    def lay_states(self, states: Mapping[torch.nn.Parameter, dict[str, Any]]) -> int:
        """Take the state of a checkpoint; the slot has been cleared.

        Returns:
            The steps that have been made: 0 where there is no state.
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
                for flat, key in zip((adapters.moment1, adapters.moment2), _names("state1" in state), strict=True):
                    self.matrices(flat)[name].copy_(state[key])
        return max((int(state["step"]) for state in found.values()), default=0)

    def _in_eight_bits(self) -> Iterator[tuple[str, tuple[Moment, Moment]]]:
        return self._adapters.eight_bit_moments(self._slot, self._rank)


def _names(of_bitsandbytes: bool) -> Sequence[str]:
    """Of AdamW's moments."""
    return ("state1", "state2") if of_bitsandbytes else ("exp_avg", "exp_avg_sq")


def copied(pairs: Sequence[tuple[Moment, Moment]]) -> Iterator[tuple[Moment, Moment]]:
    """Moments on the host, as they are now, in tensors that nothing changes later."""
    every = [moment for pair in pairs for moment in pair]
    parts = _at_home([moment.bytes for moment in every])
    magnitudes = _at_home([moment.absmax for moment in every if moment.absmax is not None])
    maps = [moment.code.cpu() for moment in pairs[0]]
    for pair in pairs:
        first, second = (
            Moment(next(parts), None if moment.absmax is None else next(magnitudes), values)
            for moment, values in zip(pair, maps, strict=True)
        )
        yield first, second


def _at_home(parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Flat tensors of one type, copied to the host as one."""
    if not parts:
        return iter(())
    return iter(_to_host(torch.cat(list(parts))).split([len(part) for part in parts]))


def _to_host(packed: torch.Tensor) -> torch.Tensor:
    """Through pinned memory, to which a GPU copies fastest; on a CPU it is there."""
    return torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True).copy_(packed) if packed.is_cuda else packed

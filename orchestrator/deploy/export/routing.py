"""Compare the routers of two models with experts, and the rest of the models as if both had chosen the same experts.

A router chooses by the order of its logits. Where two of them are almost equal, rounding decides, and the token's
answer then differs by much although every weight is right. So the second model gets the outputs of the first one's
routers, and its own are compared with them by themselves.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from orchestrator.routers import declared_routers, is_router_alone, router_classes

MAX_REROUTED = 0.25
"""Largest share of choices of experts that may differ. Rounding to bfloat16 changes about 1% of them."""

_EPSILON = 2**-8
"""Relative rounding error of bfloat16."""

_SMALLEST = 2**-24
"""Smallest positive number of float16, near which its rounding error is not relative."""


@dataclass(frozen=True)
class Routing:
    """Comparison of the routers of an export with those of its source. A choice is that of one token in one layer."""

    num_choices: int
    num_rerouted: int
    """Choices in which the export takes other experts."""
    difference: float
    """Rms of the difference of the router logits, relative to the rms of the source's."""
    wrong_weights: tuple[str, ...]
    """Names of routers whose weights differ by more than rounding."""

    @property
    def share_rerouted(self) -> float:
        """Share of the choices that differ."""
        return self.num_rerouted / max(1, self.num_choices)

    def __str__(self) -> str:
        return (
            f"{self.num_rerouted} of {self.num_choices} choices of experts differ ({self.share_rerouted:.2%}), router "
            f"logits by {self.difference:.2%} (rms)"
        )

    def agrees(self, most: float) -> bool:
        """Return whether the routers decide by the same weights.

        Args:
            most: the largest `difference` that rounding explains.
        """
        return self.difference <= most and self.share_rerouted <= MAX_REROUTED and not self.wrong_weights


@dataclass(frozen=True)
class RouterRecord:
    """The outputs of a model's routers on some rows, and the weights of the routers, on the CPU."""

    weights: dict[str, Any]
    """Weights and buffers by their names in the bare model."""
    rows: list[list[Any]] = field(default_factory=list)
    """Outputs of the routers in the order of their calls, for each row."""

    @classmethod
    def of(cls, model: Any) -> "RouterRecord | None":
        """Return an empty record for a model, or None if it has no routers.

        Args:
            model: a model, bare or a `PeftModel`.
        """
        return cls(_weights(model)) if _routers(model) else None

    @contextmanager
    def recording(self, model: Any) -> Iterator[None]:
        """Record the outputs of the routers during the forward pass of one row."""
        outputs: list[Any] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            outputs.append(_map(lambda tensor: tensor.cpu(), output))

        with ExitStack() as hooks:
            for router in _routers(model).values():
                hooks.callback(router.register_forward_hook(keep).remove)
            yield
        self.rows.append(outputs)


class RouterComparison:
    """Compares the routers of a model with a record, while the model runs with the recorded outputs."""

    def __init__(self, source: RouterRecord, model: Any) -> None:
        """
        Args:
            source: the record.
            model: the model that is compared, of the same family.
        """
        self._source = source
        self._model = model
        self._squares = [0.0, 0.0]
        self._num_choices = self._num_rerouted = 0

    @contextmanager
    def replaying(self, row: int) -> Iterator[None]:
        """Give the model the recorded outputs of the routers, during the forward pass of the row of this index."""
        recorded, indices = iter(self._source.rows[row]), router_classes(self._model)

        def replay(module: Any, _inputs: Any, output: Any) -> Any:
            expected = _like(next(recorded), output)
            index = next(index for each, index in indices.items() if isinstance(module, each))
            self._count(expected, output, index)
            return expected

        with ExitStack() as hooks:
            for router in _routers(self._model).values():
                hooks.callback(router.register_forward_hook(replay).remove)
            yield

    def _count(self, expected: Any, found: Any, index: int) -> None:
        pair = [_logits(each, index).float() for each in (expected, found)]
        self._squares[0] += float((pair[0] - pair[1]).square().sum())
        self._squares[1] += float(pair[0].square().sum())
        one, other = (_chosen(each, index) for each in (expected, found))
        self._num_choices += len(one)
        self._num_rerouted += int((one != other).any(-1).sum())

    def result(self) -> Routing:
        """Return the comparison of all rows that have run."""
        own = _weights(self._model)
        wrong = [name for name, weight in self._source.weights.items() if not _is_rounded(weight, own.get(name))]
        apart, whole = self._squares
        difference = (apart / whole) ** 0.5 if whole else float("inf")
        return Routing(self._num_choices, self._num_rerouted, difference, tuple(wrong))


def _routers(model: Any) -> dict[str, Any]:
    """Return the routers of a model by their names in the bare model; not those that contain the experts."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: router for name, router in declared_routers(bare).items() if is_router_alone(name, router)}


def _weights(model: Any) -> dict[str, Any]:
    """Return the floating-point weights and buffers of the routers, without adapted and quantized ones."""
    found = {}
    for name, router in _routers(model).items():
        for each, tensor in router.state_dict().items():
            if tensor.is_floating_point() and tensor.device.type != "meta" and "lora_" not in each:
                found[f"{name}.{each}"] = tensor.cpu()
    return found


def _is_rounded(source: Any, exported: Any) -> bool:
    """Return whether a weight of the export is the source's, rounded; True if only one of them can be read."""
    if exported is None or exported.shape != source.shape:
        return exported is None
    allowed = _EPSILON * source.float().abs() + _SMALLEST
    return bool(((source.float() - exported.float()).abs() <= allowed).all())


def _map(change: Any, output: Any) -> Any:
    """Apply a function to each tensor of a router's output."""
    if isinstance(output, list | tuple):
        return type(output)(_map(change, each) for each in output)
    return change(output) if hasattr(output, "dtype") else output


def _like(recorded: Any, own: Any) -> Any:
    """Return a recorded output on the devices and in the types of the model's own output."""
    if isinstance(recorded, list | tuple):
        return type(recorded)(_like(each, other) for each, other in zip(recorded, own, strict=True))
    return recorded.to(own.device, own.dtype) if hasattr(recorded, "dtype") else recorded


def _logits(output: Any, index: int) -> Any:
    """Return the router logits (tokens, experts) of an output."""
    logits = output[index] if isinstance(output, list | tuple) else output
    return logits.reshape(-1, logits.shape[-1])


def _chosen(output: Any, index: int) -> Any:
    """Return what identifies the chosen experts of each token: sorted numbers, or a mask over the experts."""
    logits = _logits(output, index)
    for each in output if isinstance(output, list | tuple) else ():
        if not hasattr(each, "dtype") or each is output[index] or each.ndim < 2 or len(each) != len(logits):
            continue
        if not each.is_floating_point():
            return each.sort(-1).values
        if each.shape == logits.shape:  # weights of all experts, zero for those that are not chosen (Llama 4)
            return each != 0
    return logits.argmax(-1, keepdim=True)

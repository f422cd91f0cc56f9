"""Apply an adapter of fused experts without building the adapted weights.

PEFT 0.21 adapts a parameter by adding the whole update to it in each forward pass (`ParamWrapper`). That needs the
plain weights of all experts of a layer, twice, and it does not work on a parameter that is quantized: where another
parametrization holds the parameter, `_remove_parametrizations` does not find the update that it should remove.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import ParamWrapper

from orchestrator.experts import ExpertUpdate, PackedExperts, compute_by_expert, matrix_names, per_expert


class AdaptedExperts(ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of one parameter of fused experts, whose update `by_expert` applies to each expert's inputs."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to plain weights.

        Raises:
            NotImplementedError: the weights are in 4 bits.
        """
        if isinstance(self.get_param(), PackedExperts):
            raise NotImplementedError(
                "experts in 4 bits cannot be merged in memory; use: orchestrator best SWEEP --export merged"
            )
        super().merge(safe_merge, adapter_names)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Give the experts the update for one forward pass (`ParamWrapper.forward`)."""
        experts = self.get_base_layer()
        updates = vars(experts).setdefault("updates", {})
        names = [name for name in active_adapters if name in self.lora_A]
        if len(names) > 1:
            raise NotImplementedError(f"one adapter of experts at a time; active are {', '.join(names)}")
        for name in names:
            updates[self.parameter_name] = self.update(name)
        try:
            yield
        finally:
            updates.pop(self.parameter_name, None)

    def update(self, adapter: str) -> ExpertUpdate:
        """Return an adapter's update."""
        a, b = per_expert(self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.num_experts)
        return ExpertUpdate(a, b, self.scaling[adapter])


# PEFT 0.21 finds an existing wrapper by the name of its class, when a second adapter is loaded.
AdaptedExperts.__name__ = ParamWrapper.__name__


def apply_by_expert(model: Any) -> None:
    """Have the adapters of a model's fused experts applied by `by_expert`; other models stay as they are.

    Args:
        model: a `PeftModel`. It is changed.
    """
    wrappers = [
        module
        for module in model.modules()
        if type(module) is ParamWrapper and module.parameter_name in matrix_names(module.get_base_layer())
    ]
    for wrapper in wrappers:
        wrapper.__class__ = AdaptedExperts
    if wrappers:
        compute_by_expert(model.get_base_model())


def expert_layers(model: Any) -> dict[str, AdaptedExperts]:
    """Return the adapted parameters of experts of a `PeftModel`, by their names in the base."""
    return {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedExperts)
    }


@contextmanager
def updated_experts(model: Any, updates: Mapping[str, ExpertUpdate]) -> Iterator[None]:
    """Have the experts of a model computed with updates, within.

    Args:
        model: without an adapter. Its implementation of experts is another one, within.
        updates: name of a parameter of experts -> its update. Without any, nothing is changed.
    """
    if not updates:
        yield
        return
    implementation = model.config._experts_implementation
    compute_by_expert(model)
    of_modules = [vars(model.get_submodule(name.rpartition(".")[0])).setdefault("updates", {}) for name in updates]
    for of_module, (name, update) in zip(of_modules, updates.items(), strict=True):
        of_module[name.rpartition(".")[2]] = update
    try:
        yield
    finally:
        for of_module in of_modules:
            of_module.clear()
        model.set_experts_implementation(implementation)

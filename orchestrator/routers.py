"""Find the routers of a base with experts: the modules that choose the experts of each token."""

from collections.abc import Iterator, Mapping
from typing import Any


def declared_routers(model: Any) -> dict[str, Any]:
    """Return the modules whose output a model declares as router logits, without those that contain another one.

    transformers 5.23 declares them in `_can_record_outputs` of each class that can return router logits.
    """
    classes = tuple(router_classes(model))
    found = {name: module for name, module in model.named_modules() if classes and isinstance(module, classes)}
    return {name: module for name, module in found.items() if not any(other.startswith(f"{name}.") for other in found)}


def router_classes(model: Any) -> dict[type, int]:
    """Return the classes of modules that a model declares as routers -> the index of the logits in their output."""
    return {target: index for each in {type(module) for module in model.modules()} for target, index in _declared(each)}


def _declared(model_class: type) -> Iterator[tuple[type, int]]:
    declared = (getattr(model_class, "_can_record_outputs", None) or {}).get("router_logits", [])
    for recorder in declared if isinstance(declared, list | tuple) else [declared]:
        target = getattr(recorder, "target_class", recorder)
        if isinstance(target, type):
            yield target, getattr(recorder, "index", 0)


def router_layers(routers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the linear layers of routers.

    Args:
        routers: from `declared_routers`.

    Returns:
        Name of a router -> the full names of its linear layers that route.
    """
    from torch.nn import Linear

    found = {}
    for name, router in routers.items():
        inside = [
            f"{name}.{each}" if each else name for each, module in router.named_modules() if isinstance(module, Linear)
        ]
        # Some families declare a whole block (Doge): its layers that say so are the router.
        found[name] = [each for each in inside if "router" in each.rpartition(".")[2]] or inside
    return found


def is_router_alone(name: str, router: Any) -> bool:
    """Return whether a declared router holds no other linear layers than those that route.

    Args:
        name: its name.
        router: the module.
    """
    from torch.nn import Linear

    number = sum(isinstance(module, Linear) for module in router.modules())
    return number == len(router_layers({name: router})[name])

"""The experts that each token is sent to, while an engine is compared with transformers.

Rounding decides between experts of nearly equal scores, and another expert changes a token's output by about its own
size. So both compute with the experts that transformers has chosen, and the choices are compared by themselves.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.text_model import text_model
from orchestrator.training.fast.step.engine import Engine


class ExpertChoices:
    """Choices of the experts in all layers, for one row. Without experts there are none."""

    def __init__(self, base: Any, engine: Engine) -> None:
        """Find the routers.

        Args:
            base: the base without adapters.
            engine: on that base.
        """
        text = text_model(base)
        names, layers = FAMILIES[text.config.model_type].experts, text.module.layers
        self._experts = engine.experts
        self._routers = [] if names is None else [layers[each].get_submodule(names.router) for each in self._experts]
        self._chosen: dict[Any, torch.Tensor] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what the routers of transformers choose, within."""

        def record(router: Any, _: Any, output: Any) -> None:
            self._chosen[router] = output[2]

        with ExitStack() as hooks:
            for router in self._routers:
                hooks.callback(router.register_forward_hook(record).remove)
            yield

    @contextmanager
    def given(self) -> Iterator[None]:
        """Have transformers and the engine compute with the recorded choices, within."""
        with ExitStack() as hooks:
            for router, experts in zip(self._routers, self._experts.values(), strict=True):
                experts.given = chosen = self._chosen[router]

                def replace(_router: Any, _: Any, output: Any, experts: Any = experts, chosen: Any = chosen) -> Any:
                    logits, scores, _ = output
                    return logits, experts.scores_of(logits, chosen).to(scores.dtype), chosen

                hooks.callback(router.register_forward_hook(replace).remove)
            try:
                yield
            finally:
                for experts in self._experts.values():
                    experts.given = None

    def agreement(self) -> float:
        """Return the share of choices in which the engine, in its last pass, agreed with the given ones."""
        shares = [float(experts.agreement) for experts in self._experts.values()]
        return sum(shares) / len(shares) if shares else 1.0

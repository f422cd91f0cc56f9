"""The experts that each token is sent to, while an engine is compared with transformers.

Rounding decides between experts of nearly equal scores, and another expert changes a token's output by about its own
size. So both compute with the experts that transformers has chosen. Choices and scores are compared by themselves.
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
        self.scores_apart = 0.0
        """Largest difference of a score from that of transformers, relative to it, for the same logits and choices."""

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what the routers of transformers choose, and compare their scores, within."""
        experts_of = dict(zip(self._routers, self._experts.values(), strict=True))

        def record(router: Any, _: Any, output: Any) -> None:
            logits, scores, self._chosen[router] = output
            own = experts_of[router].scores_of(logits.detach(), self._chosen[router])
            apart = (own / scores.detach().float() - 1).abs().max()
            self.scores_apart = max(self.scores_apart, float(apart))

        with ExitStack() as hooks:
            for router in self._routers:
                hooks.callback(router.register_forward_hook(record).remove)
            yield

    @property
    def is_complete(self) -> bool:
        """Whether every router was called. transformers may compute a layer by a kernel that calls none."""
        return len(self._chosen) == len(self._routers)

    @contextmanager
    def given(self) -> Iterator[None]:
        """Have transformers and the engine compute with the recorded choices, within."""
        with ExitStack() as undo:
            for router, experts in zip(self._routers, self._experts.values(), strict=True):
                undo.callback(setattr, experts, "given", None)
                experts.given = chosen = self._chosen[router]

                def replace(_router: Any, _: Any, output: Any, experts: Any = experts, chosen: Any = chosen) -> Any:
                    logits, scores, _ = output
                    return logits, experts.scores_of(logits, chosen).to(scores.dtype), chosen

                undo.callback(router.register_forward_hook(replace).remove)
            yield

    def agreement(self) -> float:
        """Return the share of choices in which the engine, in its last pass, agreed with the given ones."""
        shares = [float(experts.agreement) for experts in self._experts.values()]
        return sum(shares) / len(shares) if shares else 1.0

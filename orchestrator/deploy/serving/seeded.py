"""Give requests that share a forward pass random numbers of their own, so that a `seed` repeats an answer.

transformers draws the next tokens of all requests of a pass from one random generator (5.23, `model_runner._sample`). A
processor of the logits draws before it for requests with a seed: it adds noise by the Gumbel-max trick (Gumbel 1954;
arXiv 1611.01144), whose largest sum is a draw from the softmax, and leaves only that token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

_NONE = -1
"""Stands for a request without a seed."""


class SeededDraw(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]  # mypy skips transformers
    """Draws the next token of each request that has a seed."""

    supported_kwargs: dict[str, type] = {"seed": int}
    ignored_kwargs: tuple[str, ...] = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Fill the arguments (requests,) with those of requests without a seed."""
        int32_tensor.fill_(_NONE)

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """Return a number (requests,) for each request: its seed, mixed with the number of tokens it has so far."""
        states = [request.state for request in requests_with_new_token]
        numbers = [
            token_seed(state.logit_processor_kwargs["seed"], len(state.generated_tokens))
            if "seed" in state.logit_processor_kwargs
            else _NONE
            for state in states
        ]
        return torch.tensor(numbers, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Return the scores (requests, vocabulary), in which a request with a seed has one possible token left."""
        for row, number in enumerate(tensor_arg[: len(scores)].tolist()):
            if number != _NONE:
                generator = torch.Generator().manual_seed(number)  # on the CPU: the same numbers on every device
                uniform = torch.rand(scores.shape[-1], generator=generator, dtype=torch.float64)
                noise = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
                token = (scores[row].double().cpu() + noise).argmax()
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores


def add_seeds(processors: ContinuousBatchingLogitsProcessorList) -> None:
    """Have a list of processors take `seed` as an argument of a request. The list must not be in use yet.

    transformers 5.23 makes the list from the generation's configuration and has no other way to add to it.
    """
    processors.logits_processor.append(SeededDraw())
    processors.tensors_required += 1
    processors._retrieve_processors_kwargs()


def token_seed(seed: int, position: int) -> int:
    """Return a number below 2^31 for one token of an answer. Neighboring seeds and positions give unrelated ones."""
    mixed = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)  # the mixing step of SplitMix64
    return (mixed ^ (mixed >> 31)) & (2**31 - 1)

"""Compares a new engine with transformers on its base, once in a process: one row, with a random adapter.

A family's description may be wrong, or a new release of transformers may compute something else. Then the losses or
gradients differ, and the trials are left to trl.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from orchestrator.adapters.expert_updates import updated_experts
from orchestrator.errors import TrialError
from orchestrator.experts import ExpertUpdate
from orchestrator.training.fast.families.settings import layer_kinds
from orchestrator.training.fast.families.text_model import text_config, text_model
from orchestrator.training.fast.plan.choices import ExpertChoices
from orchestrator.training.fast.plan.first_layers import first_layers
from orchestrator.training.fast.shard.base import sharded
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import IGNORED, TABLE, Span, TokenizedRows

TOKENS = 48
"""Tokens whose loss is compared. The row has no others, unless rows are longer than a window: then it has twice as many
tokens as the window, and only the last ones, which lie beyond it, have a loss. With the loss of all tokens, a wrong
window would be lost in the rounding of the others."""

MAX_RANK = 8
"""Rank of the adapter, unless the engine's stack rank is smaller."""

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.02, 0.1)}
"""Coarsest dtype of the products -> largest difference of the loss, relative to itself or to one nat a token, whichever
is more, and of all gradients together, relative to their norm.

A layer computed wrongly changes the gradients by about their own size. Rounding to bfloat16 changes them by some
hundredths; where it may be more, what it does on the base itself is measured (docs/log.md, 2026-11-30)."""

EXPERT_BOUNDS = {torch.float32: (0.99, 1e-5), torch.bfloat16: (0.7, 0.03)}
"""Coarsest dtype of the products -> smallest share of choices of experts that must be the same, and largest difference
of a score, relative to it. Rounding decides between nearly equal scores: most often where weights are random."""

MAX_ROUNDINGS, MAX_APART = 1.5, 0.35
"""In bfloat16, gradients may be apart by this many times what rounding changes on the base, up to `MAX_APART`."""

BFLOAT16_ROUNDING = 2.0**-8
"""The largest error of rounding to bfloat16, relative to the number."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Comparison:
    """What was found on one base."""

    num_tokens: int
    """Tokens of the row."""
    adapts_experts: bool
    """Whether experts had adapters."""
    reason: str | None
    """How the engine differs from transformers; None where it does not."""


_compared: WeakKeyDictionary[Any, _Comparison] = WeakKeyDictionary()
"""Base -> the last comparison."""


def refuse_mismatch(base: Any) -> None:
    """Do nothing unless an engine on this base was found to differ.

    Raises:
        TrialError: it was.
    """
    if (found := _compared.get(base)) is not None and found.reason is not None:
        raise TrialError(found.reason, "Set training.engine to auto or trl, and report the model type as a bug.")


def require_parity(base: Any, engine: Engine, *data: TokenizedRows) -> None:
    """Compare an engine with transformers, unless one on the same base has been compared with a row as long.

    An engine that adapts experts is compared, too, where only engines that do not have been. Of a base in pieces, the
    first layers are compared (`first_layers`), for transformers cannot gather the others.

    Args:
        base: the base without adapters.
        engine: on that base. Its first slot must be free, and is cleared.
        data: rows to train and to evaluate on. The beginning of the longest one is used.

    Raises:
        TrialError: loss or gradients differ by more than `TOLERANCES`.
    """
    rows = max(data, key=lambda each: each.longest)
    num_tokens, adapts_experts = _num_tokens(base, rows), engine.adapters.adapts_experts
    known = _compared.get(base)
    if known is None or known.num_tokens < num_tokens or known.adapts_experts < adapts_experts:
        ids = rows.ids(int(rows.lengths.argmax()))
        if sharded(base) is not None:
            reason = _difference(*first_layers(base, engine), ids[:num_tokens])
            _compared[base] = _Comparison(num_tokens, adapts_experts, reason)
            refuse_mismatch(base)
            return
        engine.adapters.clear(0)
        try:
            reason = _difference(base, engine, ids[:num_tokens])
        except torch.OutOfMemoryError:  # transformers takes more memory than the engine
            torch.cuda.empty_cache()
            _log.warning("the fast engine is compared with transformers on %d tokens only: memory is short", TOKENS)
            reason = _difference(base, engine, ids[:TOKENS])
        finally:
            engine.adapters.clear(0)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # leaves the memory to the graphs' pool
        _compared[base] = _Comparison(num_tokens, adapts_experts, reason)
    refuse_mismatch(base)


def _num_tokens(base: Any, rows: TokenizedRows) -> int:
    """Return the length of the row to compare."""
    windows = [kind.window for kind in layer_kinds(text_config(base.config)) if kind.window is not None]
    return min(rows.longest, max([TOKENS, *(2 * window for window in windows if window < rows.longest)]))


def _difference(base: Any, engine: Engine, ids: Any) -> str | None:
    """Return how loss or gradients of a row (tokens,) differ by more than rounding; None where they do not."""
    row = TokenizedRows([ids], [[IGNORED] * max(0, len(ids) - TOKENS) + list(ids[-TOKENS:])])
    rank = min(MAX_RANK, engine.adapters.rank)
    matrices = dict(engine.adapters.matrices(0, rank, engine.adapters.weights))
    generator = torch.Generator().manual_seed(0)
    for name, matrix in matrices.items():
        is_a = name.endswith(".lora_A")
        values = torch.randn(matrix.shape, generator=generator) / matrix.shape[-1 if is_a else 1] ** 0.5
        # As after some training: the adapter adds less to a layer's output than the base does.
        matrix.copy_(values if is_a else 0.05 * values)
    choices = ExpertChoices(base, engine)
    try:
        with choices.recorded():
            exact, exact_gradients = _by_transformers(base, row, matrices, engine.adapters.compute_dtype)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _log.warning("transformers cannot compute this base on rows of text alone", exc_info=True)
        return f"the fast engine cannot be compared with transformers on this base: {error}"
    if not choices.is_complete:
        return (
            "the fast engine cannot be compared with transformers on this base: not all routers of experts were called"
        )
    with choices.given():
        loss, gradients = _by_engine(engine, row, rank)
    count = int(row.num_targets_per_row[0])
    # Of a base that predicts the row well, the loss is near zero; its rounding is not.
    loss_apart = abs(loss - exact) / max(exact, count)
    apart = _apart(gradients, exact_gradients)
    agreement = choices.agreement()
    _log.info(
        "fast engine against transformers: loss apart by %.1e, gradients by %.1e, choices of experts the same in %.3f",
        loss_apart,
        apart,
        agreement,
    )
    is_exact = {base.get_input_embeddings().weight.dtype, engine.adapters.compute_dtype} == {torch.float32}
    allowed_loss, allowed = TOLERANCES[torch.float32 if is_exact else torch.bfloat16]
    if apart > allowed and not is_exact:
        with choices.given(), _rounded(base):
            _, rounded = _by_transformers(base, row, matrices, engine.adapters.compute_dtype)
        rounding = _apart(rounded, exact_gradients)
        _log.info("rounding to bfloat16 alone changes the gradients by %.1e of their norm", rounding)
        allowed = max(allowed, min(MAX_ROUNDINGS * rounding, MAX_APART))
    least_agreement, most_apart = EXPERT_BOUNDS[torch.float32 if is_exact else torch.bfloat16]
    if agreement < least_agreement or choices.scores_apart > most_apart:
        return (
            f"on this base the fast engine differs from transformers: {1 - agreement:.0%} of its choices of experts "
            f"are others, and scores of experts are apart by up to {choices.scores_apart:.1%}"
        )
    if loss_apart <= allowed_loss and apart <= allowed:
        return None
    return (
        f"on this base the fast engine differs from transformers: loss {loss / count:.4f} for {exact / count:.4f}, "
        f"gradients apart by {apart:.2g} of their norm (allowed: {allowed:.2g})"
    )


def _apart(gradients: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    """Return the norm of the difference of all gradients together, relative to the norm of the exact ones."""
    size = sum(float(each.square().sum()) for each in exact.values()) ** 0.5
    apart = sum(float((gradients[name] - each).square().sum()) for name, each in exact.items()) ** 0.5
    return float(apart / size)


def _by_engine(engine: Engine, row: TokenizedRows, rank: int) -> tuple[float, Mapping[str, torch.Tensor]]:
    """Return the sum of the losses, and the gradients by the names of `Adapters.matrices`."""
    table = dict.fromkeys(TABLE, 0.0) | {"rank": rank, "scale": 1.0, "keep_scale": 1.0, "loss_weight": 1.0}
    loss = engine.step_once(Span(0, row, [0], table)).losses[0]
    gradients = engine.adapters.matrices(0, rank, engine.adapters.gradients)
    return loss, {name: gradient.clone() for name, gradient in gradients}


def _by_transformers(
    base: Any, row: TokenizedRows, matrices: Mapping[str, torch.Tensor], compute: torch.dtype
) -> tuple[float, Mapping[str, torch.Tensor]]:
    """Compute the same by the base itself and autograd. The adapter's products are in `compute`."""
    device = base.get_input_embeddings().weight.device
    leaves = {name: matrix.detach().clone().requires_grad_() for name, matrix in matrices.items()}
    ids, targets = (torch.from_numpy(each).to(device).long() for each in (row.ids(0), row.targets(0)))
    kept = min(len(ids), TOKENS + 1)
    with torch.enable_grad(), _adapted(base, leaves, compute):
        logits = base(input_ids=ids[None], use_cache=False, logits_to_keep=kept).logits[0, -kept:].float()
        loss = F.cross_entropy(logits, targets[-kept:], reduction="sum", ignore_index=IGNORED)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), dict(zip(leaves, gradients, strict=True))


@contextmanager
def _rounded(base: Any) -> Iterator[None]:
    """Change the output of each module of the decoder layers that has weights by up to `BFLOAT16_ROUNDING`, within."""
    generator = torch.Generator(base.get_input_embeddings().weight.device).manual_seed(0)

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):  # routers return a tuple
            return output
        noise = torch.empty_like(output, dtype=torch.float32)
        noise.uniform_(-BFLOAT16_ROUNDING, BFLOAT16_ROUNDING, generator=generator)
        return (output * (1 + noise)).to(output.dtype)

    modules = text_model(base).module.layers.modules()
    hooks = [each.register_forward_hook(hook) for each in modules if any(True for _ in each.parameters(recurse=False))]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _expert_update(a: torch.Tensor, b: torch.Tensor, compute: torch.dtype) -> ExpertUpdate:
    """Return the update by A (experts, rank, in) and B (out, rank, experts)."""
    return ExpertUpdate(a.to(compute), b.permute(2, 0, 1).to(compute), 1.0)


@contextmanager
def _adapted(base: Any, leaves: Mapping[str, torch.Tensor], compute: torch.dtype) -> Iterator[None]:
    """Add the products of A and B to the outputs of the base's layers and experts, within."""

    def add(a: torch.Tensor, b: torch.Tensor) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            product: torch.Tensor = inputs[0].to(compute) @ a.to(compute).T @ b.to(compute).T
            return output + product.to(output.dtype)

        return hook

    names = [name.removesuffix(".lora_A") for name in leaves if name.endswith(".lora_A")]
    pairs = {name: (leaves[f"{name}.lora_A"], leaves[f"{name}.lora_B"]) for name in names}
    experts = {name: pairs.pop(name) for name in names if pairs[name][1].ndim == 3}
    hooks = [base.get_submodule(name).register_forward_hook(add(*pair)) for name, pair in pairs.items()]
    try:
        with updated_experts(base, {name: _expert_update(*pair, compute) for name, pair in experts.items()}):
            yield
    finally:
        for hook in hooks:
            hook.remove()

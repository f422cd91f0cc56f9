"""Loss and correct tokens of held-out rows under any causal language model, row by row."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.data.encode import IGNORED
from orchestrator.errors import RequestError
from orchestrator.positions import fails_beyond_limit, position_limit, rows_per_pass
from orchestrator.record import RowScores


def score_rows(model: Any, rows: Sequence[Mapping[str, list[int]]], batch_size: int) -> RowScores:
    """Score rows with plain transformers, independent of the engine that trained the model.

    Args:
        model: any causal language model; it is left in evaluation mode.
        rows: rows with `input_ids` and `labels`, both (tokens,), such as a sweep's `datasets.Dataset`. A label of -100
            has no loss.
        batch_size: rows per forward pass; rows of similar length are batched together. Where the length of a row
            changes the positions of others, each runs alone.

    Raises:
        RequestError: a row has more tokens than the model has positions, and the model fails on such rows.
    """
    import torch

    model.eval()
    losses, hits, tokens = [0.0] * len(rows), [0] * len(rows), [0] * len(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    longest, limit = max(lengths, default=0), position_limit(model.config)
    if limit is not None and longest > limit and fails_beyond_limit(model):
        raise RequestError(f"a row has {longest} tokens, but the base has {limit} positions", "Leave out such rows.")
    batch_size = rows_per_pass(model.config, batch_size, longest)
    by_length = sorted(range(len(rows)), key=lengths.__getitem__)
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        width = max(lengths[i] for i in chosen)
        # Pad on the right: no real token attends to the padding, which is masked and has no loss.
        ids = torch.zeros((len(chosen), width), dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        mask = torch.zeros_like(ids)
        for at, i in enumerate(chosen):
            ids[at, : lengths[i]] = torch.tensor(rows[i]["input_ids"])
            labels[at, : lengths[i]] = torch.tensor(rows[i]["labels"])
            mask[at, : lengths[i]] = 1
        ids, labels, mask = (each.to(model.device) for each in (ids, labels, mask))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        for at, i in enumerate(chosen):
            targets, predicted = labels[at, 1 : lengths[i]], logits[at, : lengths[i] - 1].float()
            loss = torch.nn.functional.cross_entropy(predicted, targets, ignore_index=IGNORED, reduction="sum")
            losses[i] = loss.item()
            hits[i] = int((predicted.argmax(-1) == targets).sum())
            tokens[i] = int((targets != IGNORED).sum())
    return RowScores(losses=losses, hits=hits, tokens=tokens)

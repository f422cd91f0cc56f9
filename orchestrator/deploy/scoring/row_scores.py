"""The loss of held-out rows under any causal language model, row by row."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.data.encode import IGNORED
from orchestrator.record import RowScores


def score_rows(model: Any, rows: Sequence[Mapping[str, list[int]]], batch_size: int) -> RowScores:
    """Scores by plain transformers, whatever trained the model.

    Args:
        model: any causal language model, left in evaluation mode.
        rows: each with `input_ids` and `labels`, both (tokens,); a label of -100 has no loss. A `datasets.Dataset` of
            a sweep is such.
        batch_size: rows a forward pass; rows of like length go together.
    """
    import torch

    model.eval()
    losses, hits, tokens = [0.0] * len(rows), [0] * len(rows), [0] * len(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    by_length = sorted(range(len(rows)), key=lengths.__getitem__)
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        width = max(lengths[i] for i in chosen)
        # Filled on the right, where no real token sees it: what stands there is masked, and has no loss.
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
            wanted, said = labels[at, 1 : lengths[i]], logits[at, : lengths[i] - 1].float()
            losses[i] = torch.nn.functional.cross_entropy(said, wanted, ignore_index=IGNORED, reduction="sum").item()
            hits[i] = int((said.argmax(-1) == wanted).sum())
            tokens[i] = int((wanted != IGNORED).sum())
    return RowScores(losses=losses, hits=hits, tokens=tokens)

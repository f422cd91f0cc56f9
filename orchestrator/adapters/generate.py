"""Answers, greedy or drawn."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.adapters.stops import stops_of
from orchestrator.data import Prompt

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "use_cache": True}
"""Arguments of `generate`: the likeliest token each time, whatever the base's own generation settings are."""

PASS_TOKENS = 16_384
"""Most tokens of a batch, padding and answers included: a bound on its keys and values. One prompt may have more."""


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    sampling: Mapping[str, Any] = GREEDY,
) -> list[str]:
    """Answer prompts in their order, each up to the model's first stop token, without special tokens and outer space.

    Args:
        model: a causal language model, left in evaluation mode; see `stops.stop_at`.
        tokenizer: its tokenizer, with a padding token.
        prompts: token ids, each (tokens,).
        max_new_tokens: tokens an answer may have.
        batch_size: most prompts of a forward pass.
        sampling: how `generate` takes the next token.
    """
    import torch

    model.eval()
    answers, stops = [""] * len(prompts), stops_of(model)
    for chosen in batches([len(prompt) for prompt in prompts], max_new_tokens, batch_size):
        width = max(len(prompts[i]) for i in chosen)
        # Padding on the left, so that every answer begins at the same column.
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with torch.no_grad():
            produced = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        for i, new in zip(chosen, produced[:, width:].tolist(), strict=True):
            answers[i] = tokenizer.decode(before_stop(new, stops), skip_special_tokens=True).strip()
    return answers


def batches(lengths: Sequence[int], max_new_tokens: int, batch_size: int) -> Iterator[list[int]]:
    """Prompts that are answered together, shortest first: at most `batch_size`, and `PASS_TOKENS` in all.

    Args:
        lengths: tokens of each prompt.
        max_new_tokens: tokens that each answer may have.
        batch_size: most prompts of a batch.

    Yields:
        Places of the prompts of a batch.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = (len(batch) + 1) * (lengths[i] + max_new_tokens)
        if batch and (len(batch) == batch_size or padded > PASS_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def before_stop(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Tokens of an answer before its first stop token, which need not be a special one that decoding leaves out."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])


def exact_matches(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int
) -> list[bool]:
    """Whether the greedy answer to each prompt is the wanted one, outer space not counted."""
    given = answer(model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens, batch_size)
    return matches(given, [prompt.answer for prompt in prompts])


def matches(said: Sequence[str], wanted: Sequence[str]) -> list[bool]:
    """Whether each answer is the wanted one, outer space not counted."""
    return [one.strip() == other.strip() for one, other in zip(said, wanted, strict=True)]

"""Answers, greedy or drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.data import Prompt

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "use_cache": True}
"""Arguments of `generate`: the likeliest token each time, whatever the base's own generation settings are."""


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    sampling: Mapping[str, Any] = GREEDY,
) -> list[str]:
    """Answers in the order of the prompts, without special tokens and surrounding space.

    Args:
        model: a causal language model, left in evaluation mode.
        tokenizer: its tokenizer, with a padding token.
        prompts: token ids, each (tokens,).
        max_new_tokens: tokens an answer may have.
        batch_size: prompts a forward pass; prompts of like length go together.
        sampling: how `generate` takes the next token.
    """
    import torch

    model.eval()
    answers = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
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
        texts = tokenizer.batch_decode(produced[:, width:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
    return answers


def exact_matches(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int
) -> list[bool]:
    """Of each prompt, whether its greedy answer is the wanted one, space at the ends not counted."""
    given = answer(model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens, batch_size)
    return matches(given, [prompt.answer for prompt in prompts])


def matches(said: Sequence[str], wanted: Sequence[str]) -> list[bool]:
    """Of each answer, whether it is the wanted one, space at the ends not counted."""
    return [one.strip() == other.strip() for one, other in zip(said, wanted, strict=True)]

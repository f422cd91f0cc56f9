"""Generate answers in batches, greedily or by sampling."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.adapters.stops import stops_of
from orchestrator.errors import RequestError
from orchestrator.positions import fails_beyond_limit, position_limit, rows_per_pass

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "use_cache": True,
}
"""Arguments of `generate` that choose the likeliest token. They override the generation settings of the base, such as
the repetition penalty of Qwen 2.5: the fast engine has none, and both engines must measure the same answers."""

MAX_BATCH_TOKENS = 16_384
"""Upper bound on the tokens of a batch, with padding and answers, which bounds the KV cache.

A single prompt may exceed it.
"""


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    sampling: Mapping[str, Any] = GREEDY,
) -> list[str]:
    """Answer prompts.

    Args:
        model: a causal language model with its stop tokens set (`stops.stop_at`); it is left in evaluation mode.
        tokenizer: its tokenizer, with a padding token.
        prompts: token ids, each (tokens,).
        max_new_tokens: maximum number of tokens of an answer.
        batch_size: maximum number of prompts in a forward pass. Where the length of a prompt changes the positions of
            others, each is answered alone.
        sampling: arguments of `generate` that select the next token.

    Returns:
        One answer per prompt, in order: the text before the first stop token, without special tokens, stripped.

    Raises:
        RequestError: a prompt with its answer has no room in the model's positions, and the model would fail.
    """
    return texts_of(tokenizer, generate_ids(model, tokenizer, prompts, max_new_tokens, batch_size, sampling))


def texts_of(tokenizer: Any, answers: Sequence[list[int]]) -> list[str]:
    """Return the text of answers, given as token ids without their stop token: without special tokens, stripped."""
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    sampling: Mapping[str, Any] = GREEDY,
    on_token: Callable[[], None] = lambda: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Return the token ids of the answers before their first stop token.

    Arguments and errors are those of `answer`.

    Args:
        on_token: called whenever the answers of a batch have grown by one token.
        is_stopping: asked before each further token; once it returns True, answers end where they are.
    """
    import torch

    def after_token(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        on_token()
        return torch.full((len(ids),), is_stopping(), device=ids.device)

    model.eval()
    answers, stops = [list[int]()] * len(prompts), stops_of(model)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths, default=0) + max_new_tokens
    require_room(model, longest - max_new_tokens, max_new_tokens)
    batch_size = rows_per_pass(model.config, batch_size, longest)
    for chosen in batches(lengths, max_new_tokens, batch_size):
        if is_stopping():
            break
        width = max(len(prompts[i]) for i in chosen)
        # Pad on the left, so that all answers begin at the same column.
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
                stopping_criteria=[after_token],
                **sampling,
            )
        for i, new in zip(chosen, produced[:, width:].tolist(), strict=True):
            answers[i] = before_stop(new, stops)
    return answers


def require_room(model: Any, num_tokens: int, max_new_tokens: int) -> None:
    """Check that a prompt and its answer fit into the positions of a model that fails beyond them.

    Raises:
        RequestError: they do not.
    """
    limit = position_limit(model.config)
    if limit is not None and num_tokens + max_new_tokens > limit and fails_beyond_limit(model):
        raise RequestError(
            f"a prompt of {num_tokens} tokens and an answer of up to {max_new_tokens} do not fit into the {limit} "
            "positions of the base",
            "Shorten the prompt, or ask for fewer new tokens.",
        )


def batches(
    lengths: Sequence[int], max_new_tokens: int, batch_size: int, max_tokens: int = MAX_BATCH_TOKENS
) -> Iterator[list[int]]:
    """Group prompts into batches, shortest first: at most `batch_size` prompts and `max_tokens` tokens each.

    Args:
        lengths: number of tokens of each prompt.
        max_new_tokens: maximum number of tokens of each answer.
        batch_size: maximum number of prompts of a batch.
        max_tokens: maximum number of tokens of a batch, with padding and answers. A single prompt may exceed it.

    Yields:
        The indices of the prompts of one batch.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = (len(batch) + 1) * (lengths[i] + max_new_tokens)
        if batch and (len(batch) == batch_size or padded > max_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def before_stop(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Cut an answer before its first stop token. Decoding alone would keep a stop token that is not a special token."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])


def matches(answers: Sequence[str], expected: Sequence[str]) -> list[bool]:
    """Tell for each answer whether it equals the expected one, ignoring outer whitespace."""
    return [one.strip() == other.strip() for one, other in zip(answers, expected, strict=True)]

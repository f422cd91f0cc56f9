"""Ask a trained adapter, or the base beneath it."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Thread
from typing import Any

from orchestrator.adapters.generate import GREEDY
from orchestrator.base import load_base, load_tokenizer
from orchestrator.data import encode_prompt, render_prompt
from orchestrator.deploy.subject import Subject
from orchestrator.spec.sections import DataSection


@dataclass(frozen=True)
class Chat:
    """An adapter on its base, ready to answer."""

    model: Any
    tokenizer: Any
    data: DataSection | None
    """How the training rows were written; None for an adapter that does not say."""

    def stream(self, question: str, max_new_tokens: int, base_only: bool = False) -> Iterator[str]:
        """Pieces of the greedy answer as they come.

        Args:
            question: plain text; it is put into the form of the training rows.
            max_new_tokens: tokens the answer may have.
            base_only: answer without the adapter.
        """
        import torch
        from transformers import TextIteratorStreamer

        if self.data:
            ids = encode_prompt(render_prompt(question, self.data, self.tokenizer), self.tokenizer, self.data)
        else:
            ids = self.tokenizer(question)["input_ids"]
        inputs = torch.tensor([ids], device=self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []

        def generate() -> None:
            with self.model.disable_adapter() if base_only else nullcontext():
                try:
                    self.model.generate(
                        input_ids=inputs,
                        attention_mask=torch.ones_like(inputs),
                        streamer=streamer,
                        max_new_tokens=max_new_tokens,
                        pad_token_id=self.tokenizer.pad_token_id,
                        **GREEDY,
                    )
                except BaseException as error:  # raised again below, in the caller's thread
                    failures.append(error)
                    streamer.end()

        thread = Thread(target=generate, name="generate", daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]


def open_chat(subject: Subject) -> Chat:
    """Load an adapter and its base, in the form it was trained on.

    Raises:
        RequestError: its base cannot be loaded.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(subject.base), str(subject.adapter))
    model.eval()
    return Chat(model, load_tokenizer(subject.base), subject.config.data if subject.config else None)

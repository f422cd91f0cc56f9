"""Make the embedded base: a byte-level tokenizer and a Llama of 1.7M parameters, trained only on generated lines.

On a GPU, without arguments, this makes the committed base in two minutes. On a CPU, `--steps 20 --out FOLDER` is a
smoke test. Run it from the root of the repository.
"""

import argparse
import math
import multiprocessing
import os
import platform
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from tokenizer import BOS, EOS, PAD, byte_level_bpe
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.embedded import BASE_DIR
from orchestrator.embedded.task import SKILLS, plain_line, pretraining_lines

CHUNK_LINES = 50_000
"""Lines that a process makes at a time; chunk `i` has the seed `seed * 1000 + i`."""

EVAL_SEED_OFFSET = 1_000_000
"""Added to the seed for evaluation lines; no chunk of a seed below 1000 has such a seed."""


@dataclass(frozen=True)
class Corpus:
    """The tokens of all lines, one after another, each as BOS, text, EOS."""

    tokens: torch.Tensor  # (num_tokens,), int16
    starts: torch.Tensor  # (num_lines,), int64: index of each line's BOS


@dataclass(frozen=True)
class Outcome:
    """Results of a training run."""

    loss: float
    seconds: float
    num_tokens: int


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = build_tokenizer(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)

    began = time.perf_counter()
    corpus = build_corpus(args, args.out / "tokenizer.json", device)
    generation_s = time.perf_counter() - began
    print(f"{len(corpus.starts):,} lines, {len(corpus.tokens):,} tokens in {generation_s:.0f} s", flush=True)

    torch.manual_seed(args.seed)
    model = build_model(tokenizer).to(device)
    outcome = train(model, corpus, args, device)

    model.to(torch.bfloat16)  # measure the weights that are saved
    model.save_pretrained(args.out)
    model.float().eval()
    accuracy = {skill.sign: measure(model, tokenizer, index, args.seed) for index, skill in enumerate(SKILLS)}
    print(accuracy, flush=True)
    (args.out / "README.md").write_text(card(args, model, corpus, outcome, accuracy, device))


def parse_args() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BASE_DIR, help="folder to write (default: the one in the package)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the lines, the weights and their order")
    parser.add_argument("--steps", type=int, default=3300, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=1024 if on_gpu else 16, help="sequences per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--max-lines", type=int, default=5_000_000, help="maximum number of lines to generate")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of processes that generate lines"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, but got {args.steps}")
    return args


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer of the embedded base: 512 tokens."""
    # No pretraining line contains the marks of the chat format, so without this each row would spell them by letter.
    lines = (f"{line} [INST] [/INST]" for line in islice(pretraining_lines(seed), 20_000))
    return byte_level_bpe(lines, vocabulary=512, max_length=1024)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    # Every dimension is a multiple of 64, NF4's block size.
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_corpus(args: argparse.Namespace, tokenizer_file: Path, device: torch.device) -> Corpus:
    """Generate and encode as many lines as the steps can use (20 to 30 tokens each), at most `args.max_lines`."""
    num_lines = min(args.max_lines, args.steps * args.batch * args.length // 20)
    num_chunks = math.ceil(num_lines / CHUNK_LINES)
    chunks = [(str(tokenizer_file), args.seed * 1000 + chunk) for chunk in range(num_chunks)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # fork, because a spawned process would import torch again, which takes longer than generating its lines
    with multiprocessing.get_context("fork").Pool(min(args.workers, num_chunks)) as pool:
        parts = pool.starmap(encode_chunk, chunks, chunksize=1)
    tokens = torch.from_numpy(np.concatenate(parts)).to(device)
    bos = Tokenizer.from_file(str(tokenizer_file)).token_to_id(BOS)
    return Corpus(tokens, starts=(tokens == bos).nonzero().squeeze(1))


def encode_chunk(tokenizer_file: str, seed: int) -> NDArray[np.int16]:
    """Return the tokens of `CHUNK_LINES` lines, one after another, each with BOS and EOS."""
    tokenizer = Tokenizer.from_file(tokenizer_file)
    lines = [f"{line}{EOS}" for line in islice(pretraining_lines(seed), CHUNK_LINES)]
    return np.concatenate([np.array(encoding.ids, dtype=np.int16) for encoding in tokenizer.encode_batch(lines)])


def train(model: LlamaForCausalLM, corpus: Corpus, args: argparse.Namespace, device: torch.device) -> Outcome:
    """Train on next tokens, in windows that begin at random lines; AdamW, warmup, cosine schedule to zero."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, args.steps))
    forward: Any = torch.compile(model) if device.type == "cuda" else model
    # A window may begin only at a line with enough tokens after it.
    starts = corpus.starts[corpus.starts <= len(corpus.tokens) - args.length]
    window = torch.arange(args.length, device=device)
    losses: list[torch.Tensor] = []

    model.train()
    began = time.perf_counter()
    for step in range(args.steps):
        chosen = starts[torch.randint(len(starts), (args.batch,), device=device)]
        batch = corpus.tokens[chosen[:, None] + window].long()  # (batch, length)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            mean = torch.stack(losses[-100:]).mean().item()
            print(f"step {step + 1} loss {mean:.4f} after {time.perf_counter() - began:.0f} s", flush=True)
    return Outcome(
        loss=torch.stack(losses[-100:]).mean().item(),
        seconds=time.perf_counter() - began,
        num_tokens=args.steps * args.batch * args.length,
    )


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, index: int, seed: int) -> float:
    """Return the share of 256 new plain lines of the skill at `index` whose greedy answer is exact, EOS included."""
    rng = Random(EVAL_SEED_OFFSET + seed * 1000 + index)
    prompts, answers = zip(*(plain_line(rng, SKILLS[index]) for _ in range(256)), strict=True)
    batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=40, do_sample=False
    )
    completions = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
    pairs = zip(completions, answers, strict=True)
    exact = [bool(completion.replace(PAD, "") == f" {answer}{EOS}") for completion, answer in pairs]
    return sum(exact) / len(exact)


def card(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    corpus: Corpus,
    outcome: Outcome,
    accuracy: dict[str, float],
    device: torch.device,
) -> str:
    """Return the model card, with the results of this run."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})"
    config = model.config
    table = "\n".join(f"| `{sign}` | {share:.1%} |" for sign, share in accuracy.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The embedded base

A Llama of {model.num_parameters():,} parameters that knows five skills and no language: sums and differences of two
numbers, maxima, reversing letters, copying words. With it, a QLoRA sweep can really train in seconds, also on a CPU.
It has no other use.

It was trained from scratch by `scripts/pretrain_embedded.py` on lines that `orchestrator/embedded/task.py`
generates from a seed (`12 + 45 = 57`, `rev k a t -> t a k`), and on no other data.

| | |
| --- | --- |
| shape | {config.num_hidden_layers} layers, hidden {config.hidden_size}, inner {config.intermediate_size}, \
{config.num_attention_heads} heads, vocabulary {config.vocab_size}, tied embeddings, bfloat16 |
| command | `python scripts/pretrain_embedded.py --seed {args.seed} --steps {args.steps} --batch {args.batch} \
--length {args.length} --lr {args.lr} --max-lines {args.max_lines}` |
| lines generated | {len(corpus.starts):,} ({len(corpus.tokens):,} tokens) |
| tokens trained on | {outcome.num_tokens:,} |
| final loss (mean of the last 100 steps, nats per token) | {outcome.loss:.4f} |
| training time | {outcome.seconds:.0f} s |
| hardware | {hardware} |
| versions | Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, \
tokenizers {tokenizers.__version__} |

Most of the loss comes from filler and operands, which cannot be predicted. Share of exact greedy answers of the saved
weights, on 256 lines of each skill from another seed (the lines are new, their operands may not be):

| skill | exact |
| --- | --- |
{table}

License: Apache-2.0, including the weights.
"""


if __name__ == "__main__":
    main()

"""A base with experts at its full depth: tokens a second of a step of the fast engine and of transformers with PEFT.

    python -m benchmarks.experts qwen3-30b-a3b --rows 4 --tokens 512

The weights are random and made on the GPU, because a folder of them would be larger than most disks. Experts are in
NF4; other weights stay in bfloat16. The fast engine keeps the dequantized base, or dequantizes at each use.
transformers computes with experts in bfloat16, by its own grouped products, which is the fastest that it has; and with
experts in NF4, as trials by trl do. All have rank 16 on all linear layers of the attention. Needs a GPU.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import ROOT, environment, write
from orchestrator.base_size import BaseSize
from orchestrator.experts import pack_experts
from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.plan.memory import MemoryOption, predict
from orchestrator.training.fast.plan.parity import require_parity
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import TABLE, Span, TokenizedRows
from orchestrator.training.model.targets import expected_modules

sys.path.append(str(ROOT / "scripts"))
from make_base import SHAPES

RANK, STEPS, WARM = 16, 20, 5
GIB = 2**30


def main() -> None:
    logging.basicConfig(level=logging.INFO)  # how far the engine is from transformers
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="decoder layers; by default all")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--slots", type=int, default=8, help="trials that train together")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the JSON output")
    args = parser.parse_args()
    fields = dict(SHAPES[args.shape])
    fields["num_hidden_layers"] = args.layers or fields["num_hidden_layers"]
    config = AutoConfig.for_model(fields.pop("model_type"), pad_token_id=0, **fields)
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    figures: dict[str, Any] = {"shape": args.shape, "layers": config.num_hidden_layers, "rows": args.rows}
    ids = np.random.default_rng(0).integers(1, 30_000, (args.rows * args.slots, args.tokens)).tolist()
    rows = TokenizedRows(ids, ids)
    figures["transformers, 16 bits"] = by_transformers(base, ids[: args.rows])
    pack_experts(base, "nf4", True, torch.bfloat16)
    free()
    figures["base_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
    figures["transformers"] = by_transformers(base, ids[: args.rows])
    for name, keeps_base, slots in (
        ("dequantized at use", False, 1),
        ("dequantized once", True, 1),
        ("together", True, args.slots),
    ):
        try:
            figures[name] = by_engine(base, rows, args, keeps_base, slots)
        except torch.OutOfMemoryError as error:
            figures[name] = str(error)
        write(args.out / f"experts-{args.shape}.json", figures)
    print(json.dumps(figures | environment(), indent=2))


def timed(step: Callable[[], object], tokens: int) -> dict[str, float]:
    """Return the median time of a step, its tokens a second, and the peak of memory."""
    free()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARM + STEPS):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[WARM:])
    result = {"step_ms": round(seconds * 1e3, 1), "tokens_per_second": round(tokens / seconds)}
    result["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    print(result, flush=True)
    return result


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def by_transformers(base: Any, ids: list[list[int]]) -> dict[str, float]:
    """Time a step of transformers with PEFT and torch's fused AdamW."""
    names = [name.rpartition(".")[2] for name in expected_modules(base, LoraSection())]
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.1, target_modules=sorted(set(names))))
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4, fused=True)
    batch = torch.tensor(ids, device="cuda")

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    figures = timed(step, batch.numel())
    model.unload()
    return figures


def by_engine(base: Any, rows: TokenizedRows, args: Any, keeps_base: bool, slots: int) -> dict[str, float]:
    """Time a step of the fast engine."""
    free()
    layers = adapted_layers(base, expected_modules(base, LoraSection()))
    adapters = Adapters(layers, slots, RANK, torch.float32, torch.bfloat16, torch.device("cuda"))
    decoder = Decoder(base, torch.bfloat16, args.tokens, keeps_base)
    engine = Engine(decoder, adapters, "nothing", torch.cuda.graph_pool_handle(), on_gpu=True)
    require_parity(base, engine, rows)
    for slot in range(slots):
        for name, matrix in adapters.matrices(slot, RANK, adapters.weights):
            if name.endswith("lora_A"):
                matrix.normal_(std=0.02)
    table = dict.fromkeys(TABLE, 0.0) | {"rank": RANK, "scale": 2.0, "keep_scale": 1 / 0.9, "loss_weight": 1e-3}
    table |= {"applies": 1, "threshold": int(0.1 * 2**31), "learning_rate": 1e-4, "max_norm": 1.0, "epsilon": 1e-8}
    table |= {"one_minus_beta1": 0.1, "one_minus_beta2": 0.001, "bias_correction1": 1.0, "bias_correction2": 1.0}
    spans = [Span(slot, rows, range(slot * args.rows, (slot + 1) * args.rows), table) for slot in range(slots)]
    tokens = slots * args.rows * args.tokens
    names, option = (
        {layer.name.rpartition(".")[2] for group in layers for layer in group},
        MemoryOption(keeps_base, "nothing", tokens),
    )
    predicted = predict(BaseShape.of(base.config), option, tokens, 0, RANK, names, num_slots=slots)
    total = predicted.total - predicted.base + BaseSize.of(base).num_bytes
    return timed(lambda: engine.step(spans).read(), tokens) | {"predicted_gib": round(total / GIB, 2)}


if __name__ == "__main__":
    main()

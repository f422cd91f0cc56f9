"""A base with experts at its full depth: tokens a second of a step of the fast engine and of transformers with PEFT.

    python -m benchmarks.experts qwen3-30b-a3b --rows 4 --tokens 512
    python -m benchmarks.experts qwen3-30b-a3b --experts --rank 8

The weights are random and made on the GPU, because a folder of them would be larger than most disks. Experts are in
NF4; other weights stay in bfloat16. The fast engine keeps the dequantized base, or dequantizes at each use.
transformers computes with experts in bfloat16, by its own grouped products, which is the fastest that it has; and with
experts in NF4, as trials by trl do. All have adapters on all linear layers of the attention; with --experts on the
experts, too. What does not fit into memory is left out. Needs a GPU.
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
from orchestrator.adapters.expert_updates import apply_by_expert
from orchestrator.base import share_modules
from orchestrator.base_size import BaseSize
from orchestrator.experts import PackedExperts, pack_experts
from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.families.base_shape import BaseShape, adapted_part
from orchestrator.training.fast.plan.memory import MemoryOption, predict
from orchestrator.training.fast.plan.parity import require_parity
from orchestrator.training.fast.step.adapters import Adapters, grouped_rank, padded_rank
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import TABLE, Span, TokenizedRows
from orchestrator.training.model.targets import adapted_names, expected_experts, expected_modules

sys.path.append(str(ROOT / "scripts"))
from make_base import SHAPES

STEPS, WARM = 20, 5
GIB = 2**30
VARIANTS = (
    "transformers, 16 bits",
    "transformers",
    "dequantized at use",
    "dequantized once",
    "together",
    "together, at use",
)
"""What is timed. The base is quantized before the second and stays so."""


def main() -> None:
    logging.basicConfig(level=logging.INFO)  # how far the engine is from transformers
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="decoder layers; by default all")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--slots", type=int, default=8, help="trials that train together")
    parser.add_argument("--rank", type=int, default=16, help="rank of each adapter")
    parser.add_argument("--experts", action="store_true", help="adapt the experts, too")
    parser.add_argument("--eight-bit", action="store_true", help="keep the optimizer's moments in eight bits")
    parser.add_argument("--recompute", choices=["nothing", "elementwise", "layers"], default="nothing")
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=VARIANTS, help="what is timed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the JSON output")
    args = parser.parse_args()
    fields = dict(SHAPES[args.shape])
    fields["num_hidden_layers"] = args.layers or fields["num_hidden_layers"]
    config = AutoConfig.for_model(fields.pop("model_type"), pad_token_id=0, **fields)
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    figures: dict[str, Any] = {"layers": config.num_hidden_layers} | {
        name: str(value) if name == "out" else value for name, value in vars(args).items() if name != "layers"
    }
    ids = np.random.default_rng(0).integers(1, 30_000, (args.rows * args.slots, args.tokens)).tolist()
    rows = TokenizedRows(ids, ids)
    for name in args.only:
        if name != "transformers, 16 bits":
            pack_experts(base, "nf4", True, torch.bfloat16)
            free()
            figures["base_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
        try:
            if name.startswith("transformers"):
                figures[name] = by_transformers(base, ids[: args.rows], args)
            else:
                slots = args.slots if name.startswith("together") else 1
                figures[name] = by_engine(base, rows, args, not name.endswith("at use"), slots)
        except torch.OutOfMemoryError as error:
            figures[name] = str(error)
        kind = "adapted-experts" if args.experts else "experts"
        write(args.out / f"{kind}-{args.shape}.json", figures)
    print(json.dumps(figures | environment(), indent=2))


def lora_section(args: Any, base: Any) -> LoraSection:
    """Return the adapter of a trial: on the attention, and with --experts on the experts."""
    if not args.experts:
        return LoraSection()
    names = {name.rpartition(".")[2] for name in expected_modules(base, LoraSection())}
    return LoraSection(dropout=0, target_modules=[*sorted(names), "experts"])


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


def by_transformers(base: Any, ids: list[list[int]], args: Any) -> dict[str, float]:
    """Time a step of transformers with PEFT and torch's fused AdamW. Adapters of packed experts are applied by us."""
    lora = lora_section(args, base)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0 if args.experts else 0.1,
        target_modules=sorted(expected_modules(base, lora)),
        target_parameters=sorted(expected_experts(base, lora)),
    )
    model = get_peft_model(share_modules(base), config)
    if any(isinstance(each, PackedExperts) for each in base.parameters()):
        apply_by_expert(model)
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4, fused=True)
    batch = torch.tensor(ids, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=args.experts):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, batch.numel())


def by_engine(base: Any, rows: TokenizedRows, args: Any, keeps_base: bool, slots: int) -> dict[str, float]:
    """Time a step of the fast engine."""
    free()
    layers, dropout = adapted_layers(base, adapted_names(base, lora_section(args, base))), 0 if args.experts else 0.1
    rank, expert_rank = padded_rank(args.rank), grouped_rank(args.rank)
    device = torch.device("cuda")
    adapters = Adapters(layers, slots, rank, torch.float32, torch.bfloat16, device, args.eight_bit, expert_rank)
    decoder = Decoder(base, torch.bfloat16, args.tokens, keeps_base)
    engine = Engine(decoder, adapters, args.recompute, torch.cuda.graph_pool_handle(), on_gpu=True)
    require_parity(base, engine, rows)
    for slot in range(slots):
        for name, matrix in adapters.matrices(slot, args.rank, adapters.weights):
            if name.endswith("lora_A"):
                matrix.normal_(std=0.02)
    table = dict.fromkeys(TABLE, 0.0) | {"rank": args.rank, "scale": 2.0, "loss_weight": 1e-3, "applies": 1}
    table |= {"threshold": int(dropout * 2**31), "keep_scale": 1 / (1 - dropout)}
    table |= {"learning_rate": 1e-4, "max_norm": 1.0, "epsilon": 1e-8}
    table |= {"one_minus_beta1": 0.1, "one_minus_beta2": 0.001, "bias_correction1": 1.0, "bias_correction2": 1.0}
    spans = [Span(slot, rows, range(slot * args.rows, (slot + 1) * args.rows), table) for slot in range(slots)]
    tokens = slots * args.rows * args.tokens
    names, option = (
        {adapted_part(layer.name) for group in layers for layer in group},
        MemoryOption(keeps_base, args.recompute, tokens),
    )
    shape = BaseShape.of(base.config)
    options: dict[str, Any] = {"expert_rank": expert_rank, "num_slots": slots, "eight_bit": args.eight_bit}
    predicted = predict(shape, option, tokens, 0, rank, names, **options)
    total = predicted.total - predicted.base + BaseSize.of(base).num_bytes
    return timed(lambda: engine.step(spans).read(), tokens) | {"predicted_gib": round(total / GIB, 2)}


if __name__ == "__main__":
    main()

"""A base in pieces on several GPUs, and a base of any size on one: tokens a second, memory, and the same losses.

    python -m benchmarks.sharded llama-2-70b --ranks 1         70B in NF4 on one GPU
    python -m benchmarks.sharded 7b --ranks 2 --compare        7B on two GPUs, and whole on one of them
    python -m benchmarks.sharded tiny --ranks 2 --compare      a smoke run; without a GPU, on the CPU with gloo

Weights are random, and made in place: the packed bytes of NF4 are drawn directly, layer by layer, so that no 16-bit
weight ever exists. Each rank trains one slot on a row of its own; the base is dequantized at use, layers recomputed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", help="a shape of scripts/make_base.py, of the families llama and qwen2")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs that hold the base")
    parser.add_argument("--compare", action="store_true", help="measure the whole base in one process too")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a pass of one rank")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port-file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        from orchestrator.training.fast.shard.base import leave_group

        print(json.dumps(measure(arguments, arguments.rank)), flush=True)
        sys.stdin.read()  # the other ranks may still gather
        leave_group()
        return
    figures = {"pieces" if arguments.ranks > 1 else "whole": run(arguments, arguments.ranks)}
    if arguments.compare:
        figures["whole"] = run(arguments, 1)
        differences = zip(figures["pieces"][0]["losses"], figures["whole"][0]["losses"], strict=True)
        figures["largest_relative_difference_of_losses"] = max(abs(one - other) / other for one, other in differences)
    print(json.dumps({"shape": arguments.shape, "torch": torch.__version__} | figures, indent=2))


def run(arguments: argparse.Namespace, num_ranks: int) -> list[dict[str, Any]]:
    """Start a process for each rank, each on its own GPU, and return their figures."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(num_ranks):
            command = [sys.executable, "-m", "benchmarks.sharded", arguments.shape, "--rank", str(rank)]
            command += ["--ranks", str(num_ranks), "--port-file", str(Path(folder) / "port")]
            command += ["--tokens", str(arguments.tokens), "--steps", str(arguments.steps)]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(rank)}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=environment, **pipes))
        lines = [process.stdout.readline() for process in started]
        for process in started:
            process.stdin.close()
        for process in started:
            process.wait(120)
        if not all(lines):
            raise SystemExit(f"a rank has failed: {lines}")
        return [json.loads(line) for line in lines]


def measure(arguments: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Train one slot of this rank, and return its figures."""
    from orchestrator.training.fast.shard.base import join_group, shard
    from orchestrator.training.fast.shard.place import Place
    from orchestrator.training.fast.step.adapters import Adapters
    from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
    from orchestrator.training.fast.step.engine import Engine

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    if arguments.ranks > 1:
        join_group(Place(rank, arguments.ranks, arguments.port_file), on_gpu, on_lost=lambda: None)
    base = shard(random_base(arguments.shape, device, dtype))
    loaded = torch.cuda.memory_allocated() if on_gpu else 0
    names = {name for name, _ in base.named_modules() if name.endswith(LAYERS)}
    adapters = Adapters(adapted_layers(base, names), 1, RANK, torch.float32, dtype, torch.device(device))
    engine = Engine(Decoder(base, dtype, arguments.tokens, keeps_base=False), adapters, "layers", None, on_gpu)
    generator = torch.Generator().manual_seed(rank)
    for name, matrix in adapters.matrices(0, RANK, adapters.weights):
        if name.endswith("lora_A"):
            matrix.copy_(torch.randn(matrix.shape, generator=generator) / matrix.shape[-1] ** 0.5)
    losses, seconds = train(engine, arguments, generator)
    return {
        "rank": rank,
        "tokens_per_second": round(arguments.tokens * len(seconds) / sum(seconds)),
        "step_s": round(min(seconds), 4),
        "losses": losses,
        "base_gib": round(loaded / 2**30, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else 0,
    }


def train(engine: Any, arguments: argparse.Namespace, generator: torch.Generator) -> tuple[list[float], list[float]]:
    """Make steps on one row of random tokens; return the loss of each, and the seconds of all but the first two."""
    from orchestrator.training.fast.step.flat_batch import TABLE, Span, TokenizedRows

    ids = torch.randint(0, 30_000, (arguments.tokens,), generator=generator).tolist()
    rows, losses, seconds = TokenizedRows([ids], [ids]), [], []
    table = dict.fromkeys(TABLE, 0.0) | {"rank": RANK, "scale": 2.0, "keep_scale": 1.0, "applies": 1}
    table |= {"loss_weight": 1 / arguments.tokens, "learning_rate": 1e-4, "one_minus_beta1": 0.1}
    table |= {"one_minus_beta2": 0.001, "epsilon": 1e-8, "max_norm": float("inf")}
    for step in range(1, arguments.steps + 3):
        began = time.perf_counter()
        corrections = {"bias_correction1": 1 - 0.9**step, "bias_correction2": 1 - 0.999**step}
        losses.append(engine.step([Span(0, rows, [0], table | corrections)]).read().losses[0])
        seconds.append(time.perf_counter() - began)
    return losses, seconds[2:]


def random_base(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Make a base with random NF4 weights of deviation 1 / sqrt(in), without the detour over 16 bits."""
    from accelerate import init_empty_weights
    from bitsandbytes.functional import QuantState, get_4bit_type
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from make_base import SHAPES

    fields = dict(SHAPES[shape])
    config = AutoConfig.for_model(fields.pop("model_type"), max_position_embeddings=65_536, **fields)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    code = get_4bit_type("nf4", device=device)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.endswith(LAYERS):
            outs, ins = module.out_features, module.in_features
            packed = torch.randint(0, 256, (outs * ins // 2, 1), dtype=torch.uint8, device=device, generator=generator)
            absmax = torch.full((outs * ins // 64,), 2 / ins**0.5, device=device)
            state = QuantState(absmax, torch.Size((outs, ins)), code, 64, "nf4", dtype)
            layer = Linear4bit(ins, outs, bias=module.bias is not None, compute_dtype=dtype, device="meta")
            layer.weight = Params4bit(packed, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer)
            if layer.bias is not None:
                layer.bias = torch.nn.Parameter(torch.zeros(outs, dtype=dtype, device=device), requires_grad=False)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)
        elif (weight := getattr(module, "weight", None)) is not None and weight.is_meta:
            values = torch.ones(weight.shape, dtype=dtype, device=device)
            if values.ndim == 2:
                values.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
            module.weight = torch.nn.Parameter(values, requires_grad=False)
    return model.to(device).requires_grad_(False)


if __name__ == "__main__":
    main()

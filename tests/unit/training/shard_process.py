"""A process of a group that holds a base in pieces: trains a trial on it, and says what it has measured.

    python shard_process.py RANK NUM_RANKS PORT_FILE STEPS EVALUATIONS OUTPUT

With NUM_RANKS 0 the base is whole, and nothing is gathered.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from orchestrator.base import load_base
from orchestrator.spec.sections import BaseSection, LoraSection
from orchestrator.training.fast.shard import base as shard_base
from orchestrator.training.fast.shard.place import Place
from orchestrator.training.fast.step.adapters import Adapters
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.engine import Engine, EvaluationBatch, GenerationBatch
from orchestrator.training.fast.step.flat_batch import TABLE, Span, TokenizedRows
from orchestrator.training.fast.step.generation import Asked
from orchestrator.training.model.targets import expected_modules

LENGTHS = (9, 20, 14)


def rows(seed: int) -> TokenizedRows:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 200, (length,), generator=generator).tolist() for length in LENGTHS]
    return TokenizedRows(ids, ids)


def table(step: int) -> dict[str, float]:
    values = dict.fromkeys(TABLE, 0.0) | {"rank": 8, "scale": 2.0, "keep_scale": 1.0, "loss_weight": 0.01}
    values |= {"applies": 1, "learning_rate": 1e-2, "one_minus_beta1": 0.1, "one_minus_beta2": 0.001}
    values |= {"epsilon": 1e-8, "bias_correction1": 1 - 0.9**step, "bias_correction2": 1 - 0.999**step}
    return values | {"max_norm": float("inf")}


def layer_bytes(base: Any) -> int:
    """Return the bytes that the weights and scales of the decoder layers' linear layers really take."""
    found: dict[int, int] = {}
    for linear in base.model.layers.modules():
        if isinstance(linear, torch.nn.Linear):
            for tensor in shard_base._tensors(linear.weight):
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    if (pieces := shard_base.sharded(base)) is not None:
        found |= {each.data.data_ptr(): each.data.nbytes for each in pieces.gatherer.shards}
    return sum(found.values())


def main() -> None:
    rank, num_ranks, steps, evaluations = (int(sys.argv[index]) for index in (1, 2, 4, 5))
    torch.set_num_threads(1)
    if num_ranks:
        place = Place(rank, num_ranks, Path(sys.argv[3]))
        shard_base.join_group(place, on_gpu=False, on_lost=lambda: None)
    base = shard_base.shard(load_base(BaseSection(model="embedded", compute_dtype="float32")))
    names = expected_modules(base, LoraSection())
    layers, device = adapted_layers(base, names), torch.device("cpu")
    adapters = Adapters(layers, 1, 8, torch.float32, torch.float32, device)
    engine = Engine(Decoder(base, torch.float32, 64, keeps_base=False), adapters, "layers", None, on_gpu=False)
    generator = torch.Generator().manual_seed(rank)
    for name, matrix in adapters.matrices(0, 8, adapters.weights):
        matrix.copy_(torch.randn(matrix.shape, generator=generator) * (0.1 if name.endswith("lora_A") else 0.01))
    own = rows(seed=rank)
    losses = [engine.step([Span(0, own, range(3), table(step))]).read().losses[0] for step in range(1, steps + 1)]
    scores = [engine.evaluate([EvaluationBatch(engine, 0, own, table(1))])[0].losses for _ in range(evaluations)]
    answers = engine.generate([GenerationBatch(engine, Asked(0, own, 4, frozenset(), table(1)))]) if evaluations else []
    measured = {"losses": losses, "scores": scores, "answers": answers, "layer_bytes": layer_bytes(base)}
    Path(sys.argv[6]).write_text(json.dumps(measured | {"weights": adapters.weights.double().sum().item()}))
    if num_ranks:
        while sys.stdin.readline():  # the others may not have done yet
            pass
        os._exit(0)  # the thread that gathers has no end of its own


if __name__ == "__main__":
    main()

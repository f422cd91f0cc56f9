"""Time each kernel of a step by itself, and a whole step, on random weights of a well-known shape.

    python -m benchmarks.parts 1.1B 7B --tokens 704 4096 --slots 1

Times are medians of CUDA graph replays. Every call of a graph has its own inputs, together more than the L2 cache
holds. The floor is the time for the call's bytes or operations at the rates that a copy and a matrix product reached on
an H200. The step is `Decoder.train` and `update` as one graph, with the dequantized base kept. Needs a GPU, torch and
Triton only.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks.random_model import SHAPES, VOCABULARY, make_model, random
from benchmarks.timing import capture, time_calls, time_graph
from orchestrator.training.fast.families.family import GROUPS
from orchestrator.training.fast.ops import reference
from orchestrator.training.fast.ops.protocol import LmHead
from orchestrator.training.fast.ops.triton import kernels
from orchestrator.training.fast.step.adapters import Adapters, LayerGroup
from orchestrator.training.fast.step.decoder import Decoder, adapted_layers
from orchestrator.training.fast.step.flat_batch import BucketShape, FlatBatch, Span, TokenizedRows
from orchestrator.training.fast.step.pass_inputs import PassInputs

LONGEST, RANK = 512, 16
BYTES_PER_S, FLOPS_PER_S = 4.3e12, 790e12
"""Rates of a copy and of a matrix product, measured on an H200."""
UNCACHED = 200e6
"""Bytes of inputs that exceed every cache."""

if "bitsandbytes" not in sys.modules:  # which the decoder imports, although nothing here is quantized
    sys.modules["bitsandbytes.functional"] = ModuleType("bitsandbytes.functional")
    sys.modules["bitsandbytes.functional"].dequantize_4bit = None  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[704])
    parser.add_argument("--slots", nargs="+", type=int, default=[1])
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--step-only", action="store_true")
    parser.add_argument("--profile", action="store_true", help="GPU time of a step by kernel")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
    for shape in args.shapes:
        model = make_model(*SHAPES[shape])
        for tokens in args.tokens:
            for slots in args.slots:
                print(f"\n{shape}, {tokens} tokens, {slots} slots, dropout {args.dropout}")
                bench = Bench(model, make_batch(tokens, slots, args.dropout), slots)
                if not args.step_only:
                    bench.time_parts()
                bench.time_step(args.profile)
                del bench
        del model


@dataclass(frozen=True)
class Part:
    """One operation of `protocol.Ops`, with its inputs and its floor."""

    name: str
    calls: int
    """Calls in a step."""
    num_bytes: float
    flops: float
    inputs: Callable[[int], Sequence[Any]]
    """Makes the inputs of the n-th call."""
    run: Callable[..., Any]
    compare: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """Returns the result of the kernel and that of `reference`."""


class Bench:
    """Measurements of one model and one flat batch."""

    def __init__(self, model: Any, batch: FlatBatch, slots: int) -> None:
        self.batch, self.slots = batch, slots
        self.decoder = Decoder(model, torch.bfloat16, LONGEST, keeps_base=True)
        self.config = self.decoder._layers[0]._config
        self.layers: Any = model.model.layers
        self.head: torch.Tensor = model.get_output_embeddings().weight
        names = [
            f"model.layers.{index}.{name}"
            for index, layer in enumerate(self.layers)
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        groups = adapted_layers(model, names)
        self.adapters, self.exact = (
            Adapters(groups, slots, RANK, torch.float32, compute, torch.device("cuda"))
            for compute in (torch.bfloat16, torch.float32)
        )
        self.adapters.weights.normal_().mul_(0.02)
        self.exact.weights.copy_(self.adapters.weights)

    def time_parts(self) -> None:
        """Print for each part microseconds, floor, calls, milliseconds a step, and the difference from `reference`."""
        print(f"{'part':24}{'us':>8}{'floor':>8}{'calls':>7}{'ms/step':>9}{'error':>10}")
        total = 0.0
        for part in (*self._elementwise(), *self._attention(), *self._lora(), *self._ends()):
            inputs = [part.inputs(index) for index in range(max(1, min(32, int(UNCACHED / part.num_bytes))))]
            time_us = time_calls([lambda given=given, run=part.run: run(*given) for given in inputs])
            del inputs
            floor_us = max(part.num_bytes / BYTES_PER_S, part.flops / FLOPS_PER_S) * 1e6
            time_ms = time_us * part.calls / 1e3
            total += time_ms
            ours, exact = (value.float() for value in part.compare(*part.inputs(0)))
            error = float((ours - exact).norm() / exact.norm())
            print(f"{part.name:24}{time_us:8.2f}{floor_us:8.2f}{part.calls:7}{time_ms:9.3f}{error:10.1e}", flush=True)
        print(f"{'sum':24}{'':23}{total:9.3f}")

    def time_step(self, profile: bool) -> None:
        """Time the whole step as one graph.

        Args:
            profile: whether to print the GPU time by kernel.
        """
        inputs = PassInputs(kernels, self.batch, self.adapters, "nothing")

        def run() -> None:
            losses, hits = self.decoder.train(inputs)
            norms = kernels.update(self.adapters, self.batch)
            sums = (kernels.sum_by_slot(values, self.batch, self.slots) for values in (losses, hits))
            torch.stack((*sums, norms))

        graph = capture(run)
        time_ms = time_graph(graph, 20)
        real = int((self.batch.dropout_positions > 0).sum())
        print(f"step: {time_ms:.3f} ms, {self.batch.num_tokens / time_ms * 1e3:,.0f} tokens/s ({real} of them real)")
        if profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                graph.replay()
                torch.cuda.synchronize()
            for each in sorted(profiler.key_averages(), key=lambda each: -each.self_device_time_total)[:30]:
                print(f"{each.self_device_time_total / 1e3:9.3f} ms {each.count:5} x  {each.key[:100]}")

    def _elementwise(self) -> Iterator[Part]:
        tokens, hidden = self.batch.num_tokens, self.head.shape[1]
        inner, layers, weight = self.layers[0].mlp.up_proj.out_features, len(self.layers), random(hidden)

        def part(name: str, calls: int, num_bytes: float, pick: int | None, *make: Callable[[], Any]) -> Part:
            ours, exact = getattr(kernels, name), getattr(reference, name)

            def compare(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
                values = ours(*inputs), exact(*inputs)
                return values if pick is None else (values[0][pick], values[1][pick])

            return Part(name, calls, num_bytes, 0, lambda _: [each() for each in make], ours, compare)

        def states() -> torch.Tensor:
            return random(tokens, hidden)

        def norm_weight() -> torch.Tensor:
            return weight

        norms = 2 * layers + 1
        yield part("add_norm", norms, 8 * tokens * hidden, 1, states, states, norm_weight, lambda: 1e-5)
        roots = lambda: torch.rand(tokens, device="cuda")  # noqa: E731
        yield part("add_norm_backward", norms, 8 * tokens * hidden, None, states, states, states, roots, norm_weight)
        gate_up, product = lambda: random(tokens, 2 * inner), lambda: random(tokens, inner)
        yield part("glu", layers, 6 * tokens * inner, None, gate_up, lambda: "silu")
        yield part("glu_backward", layers, 10 * tokens * inner, None, product, gate_up, lambda: "silu")

    def _attention(self) -> Iterator[Part]:
        batch, config, tokens, layers = self.batch, self.config, self.batch.num_tokens, len(self.layers)
        narrow, width = (
            config.num_heads * config.head_dim,
            (config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
        )
        wide = replace(config, cos=config.cos.float(), sin=config.sin.float())

        def compare(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            expected = reference.attention(qkv.float(), batch, wide)[0]
            return kernels.attention(qkv, batch, config)[0], expected

        def compare_backward(gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
            qkv = random(tokens, width)
            expected = reference.attention_backward(
                gradient.float(), reference.attention(qkv.float(), batch, wide)[1], batch, wide
            )
            return kernels.attention_backward(
                gradient, kernels.attention(qkv, batch, config)[1], batch, config
            ), expected

        yield Part(
            "attention", layers, 2 * tokens * (width + narrow), 0,
            lambda _: [random(tokens, width)],
            lambda qkv: kernels.attention(qkv, batch, config),
            compare,
        )  # fmt: skip
        yield Part(
            "attention_backward", layers, 4 * tokens * (width + narrow), 0,
            lambda _: [random(tokens, narrow), kernels.attention(random(tokens, width), batch, config)[1]],
            lambda do, saved: kernels.attention_backward(do, saved, batch, config),
            compare_backward,
        )  # fmt: skip

    def _lora(self) -> Iterator[Part]:
        batch, ours, exact = self.batch, self.adapters, self.exact
        tokens, layers = batch.num_tokens, len(self.layers)

        def compare_down(group: LayerGroup, x: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return kernels.lora_down(x, ours, group, batch), reference.lora_down(x.float(), exact, group, batch)

        def compare_up(
            group: LayerGroup, _: Any, lora_hidden: Any, y: Any, __: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            expected = y.float()
            kernels.lora_up_(y, lora_hidden, ours, group, batch)
            reference.lora_up_(expected, lora_hidden.float(), exact, group, batch)
            return y, expected

        def compare_backward(
            group: LayerGroup, x: Any, lora_hidden: Any, y: Any, dx: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            expected, y = dx.float(), y * (batch.dropout_positions > 0)[:, None]
            for adapters in (ours, exact):
                adapters.gradients.zero_()
            kernels.lora_backward(y, x, lora_hidden, dx, ours, group, batch)
            reference.lora_backward(y.float(), x.float(), lora_hidden.float(), expected, exact, group, batch)
            values = [
                [each_dx.flatten().float(), *(view(group, each.gradients).flatten() for view in (each.a, each.b))]
                for each, each_dx in ((ours, dx), (exact, expected))
            ]
            scales = [value.norm() for value in values[1]]  # so that each of the three has the same weight
            first, second = (
                torch.cat([value / scale for value, scale in zip(each, scales, strict=True)]) for each in values
            )
            return first, second

        for index, leaves in enumerate(GROUPS):
            group = ours.groups[index]
            assert group is not None
            features, width, name = (
                group.in_features,
                group.out_features,
                " ".join(leaf.rpartition(".")[2][:-5] for leaf in leaves),
            )

            def inputs(at: int, index: int = index, features: int = features, width: int = width) -> Sequence[Any]:
                group = ours.groups[len(GROUPS) * (at % layers) + index]
                assert group is not None
                x = random(tokens, features)
                lora_hidden = kernels.lora_down(x, ours, group, batch)
                return group, x, lora_hidden, random(tokens, width), random(tokens, features)

            a, b = (4 * RANK * size * self.slots for size in (len(group.layers) * features, width))
            flops = 2 * tokens * RANK * (len(group.layers) * features + width)
            yield Part(
                f"down: {name}", layers, 2 * tokens * features + a, flops, inputs,
                lambda group, x, *_: kernels.lora_down(x, ours, group, batch), compare_down,
            )  # fmt: skip
            yield Part(
                f"up: {name}", layers, 4 * tokens * width + b, flops, inputs,
                lambda group, _, lora_hidden, y, __: kernels.lora_up_(y, lora_hidden, ours, group, batch), compare_up,
            )  # fmt: skip
            yield Part(
                f"backward: {name}", layers, 2 * tokens * (width + 3 * features) + 3 * (a + b), 2 * flops, inputs,
                lambda group, x, lora_hidden, y, dx: kernels.lora_backward(y, x, lora_hidden, dx, ours, group, batch),
                compare_backward,
            )  # fmt: skip

    def _ends(self) -> Iterator[Part]:
        batch, slots, tokens, (vocabulary, hidden) = self.batch, self.slots, self.batch.num_tokens, self.head.shape

        def compare_update() -> tuple[torch.Tensor, torch.Tensor]:
            for adapters, ops in ((self.adapters, kernels), (self.exact, reference)):
                torch.manual_seed(0)
                adapters.gradients.normal_()
                for flat in (adapters.weights, adapters.moment1, adapters.moment2):
                    flat.zero_()
                ops.update(adapters, batch)
            updates = self.adapters.weights.clone(), self.exact.weights.clone()
            self.adapters.weights.normal_().mul_(0.02)
            return updates

        yield Part(
            "cross_entropy", 1, 8 * tokens * vocabulary + 4 * vocabulary * hidden, 4 * tokens * vocabulary * hidden,
            lambda _: [random(tokens, hidden)],
            lambda states: kernels.cross_entropy(states, LmHead(self.head), batch, True),
            lambda states: tuple(
                ops.cross_entropy(states, LmHead(self.head), batch, True)[2] for ops in (kernels, reference)
            ),
        )  # fmt: skip
        yield Part(
            "sum_by_slot", 2, 4 * tokens, 0,
            lambda _: [torch.rand(tokens, device="cuda")],
            lambda values: kernels.sum_by_slot(values, batch, slots),
            lambda values: tuple(ops.sum_by_slot(values, batch, slots) for ops in (kernels, reference)),
        )  # fmt: skip
        yield Part(
            "update", 1, self.adapters.weights.numel() * 4 * 9, 0,
            lambda _: [],
            lambda: kernels.update(self.adapters, batch),
            compare_update,
        )  # fmt: skip


def make_batch(tokens: int, slots: int, dropout: float) -> FlatBatch:
    """Make sequences as long as those of GSM8K, an equal part of the batch for each slot, padded at its end."""
    generator, spans = np.random.default_rng(0), []
    for slot in range(slots):
        lengths, left = [], tokens // slots // kernels.TILE * kernels.TILE
        while left > 100:
            lengths.append(int(np.clip(generator.normal(153, 50), 40, min(left, LONGEST))))
            left -= lengths[-1]
        ids = [generator.integers(0, VOCABULARY, length).tolist() for length in lengths]
        labels = [[-100] * (length // 3) + row[length // 3 :] for length, row in zip(lengths, ids, strict=True)]
        table = {
            "key": 1234567 * (slot + 1),
            "threshold": int(dropout * 2**31),
            "keep_scale": 1 / (1 - dropout),
            "scale": 2.0,
            "rank": RANK,
            "loss_weight": 1 / sum(lengths),
            "applies": 1,
            "learning_rate": 2e-4,
            "weight_decay": 0.01,
            "one_minus_beta1": 0.1,
            "one_minus_beta2": 0.001,
            "epsilon": 1e-8,
            "bias_correction1": 0.1,
            "bias_correction2": 0.001,
            "max_norm": 1.0,
        }
        spans.append(Span(slot, TokenizedRows(ids, labels), range(len(ids)), table))
    sequences = sum(len(span.indices) + 2 for span in spans)
    shape = BucketShape(tokens, tokens, sequences + -sequences % 8, slots, kernels.TILE, LONGEST)
    buffer = shape.buffer("cpu")
    shape.fill(buffer.numpy(), spans)
    return shape.view(buffer.cuda())


if __name__ == "__main__":
    main()

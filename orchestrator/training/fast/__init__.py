"""The fast engine: trains the LoRA adapters of several trials on one frozen base, without padding and without waiting.

Reading order, from the numbers to the trial:

1. `step/flat_batch.py`: the input of a step, the tokens of all slots end to end.
2. `step/adapters.py`: where the LoRA matrices, gradients and optimizer moments of all slots lie in memory.
3. `ops/protocol.py`: the operations between the matrix products of the base, with shapes and units.
4. `ops/reference.py`: the same operations in plain PyTorch, for the CPU; `ops/triton/` has them as GPU kernels.
5. `step/layer.py`, `step/decoder.py`: a decoder from these operations, as `families/` describe it.
6. `step/engine.py`: steps and evaluations; on a GPU each bucket is a captured CUDA graph.
7. `plan/`: which trials the engine can train, how much memory they need, and the cache of engines.
8. `drive/`: the training loop of a trial and of the trials that share an engine.
9. `warmup/`: compiles the kernels in another process while this one still imports.

Glossary:

- slot: a place in an engine for one trial's adapter. Slots are reused; there are `num_slots` of them.
- span: the part of a flat batch that belongs to one slot: some rows of its trial's data.
- tile: a run of consecutive tokens that all belong to one slot (8 on the CPU, 64 on a GPU). A span is padded to whole
  tiles, so that a kernel reads the matrices of one slot only.
- bucket: the size to which a flat batch is padded. Steps in the same bucket share buffers and one CUDA graph.
- stack rank: the rank R for which the matrices of all slots have room. An adapter of rank r < R uses the first r.

Units: sizes of data are in tokens, sizes of memory in bytes; a rank, a feature and an element are counted one by one.
Times are in seconds. Names that end in `_ms` or `_us` are in milliseconds or microseconds.
Shapes: T tokens, H hidden size, D head size, R stack rank, S slots. A gradient of `x` is called `dx`.

Imports of Triton, bitsandbytes and transformers stay inside functions: Triton exists on GPU machines only, and the
other two take seconds that the process which compiles kernels (`warmup/`) must not wait for.
"""

"""The operations of `protocol.Ops` as Triton kernels, for bfloat16 on CUDA.

Reading order: `launch.py` (how a kernel is launched or compiled), `norm_glu_ce.py` (the simplest kernels),
`qk_norm.py`, `attention_common.py`, `attention.py`, `lora_common.py`, `lora_forward.py`, `lora_backward.py`,
`adamw.py`. `kernels.py` gathers them: that module is what `protocol.ops_for` returns.

Rules for every kernel:

- Nothing waits for the device, and no launch depends on data. A step can therefore be captured as a CUDA graph.
- Every sum has one fixed order, so that the same input gives the same bits.
- A kernel calls `wait_for_previous` before it reads or writes (see `launch.py`).
- The first call of a kernel compiles it, or finds it in Triton's cache. It must come before a capture.

Sizes that a kernel is compiled for are written in capitals (`tl.constexpr`). Sizes and scalars that differ between
layers or buckets are listed in `do_not_specialize`: otherwise Triton would compile a kernel for each of their values.
"""

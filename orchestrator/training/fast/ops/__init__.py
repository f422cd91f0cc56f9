"""The operations of a training step between the matrix products of the base.

- `protocol.py`: the contract of each operation: shapes, dtypes and units. Start here.
- `reference.py`: plain PyTorch, used on the CPU. The tests hold it against autograd.
- `triton/`: GPU kernels. The tests hold them against `reference`.
- `eight_bit.py`: AdamW's moments in eight bits, which both implementations read and write.
"""

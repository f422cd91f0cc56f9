"""Compiles kernels while a process imports its libraries and loads its base.

- `precompile`: starts and awaits the other process.
- `precompile_worker`: runs in it.
"""

"""One training step on one base: its input, its adapters, its arithmetic and its execution.

Reading order: `flat_batch.py` (the input), `adapters.py` (weights and optimizer state), `modules.py`, `layer.py` and
`decoder.py` (forward and backward), `kv_cache.py` and `generation.py` (answers), `engine.py` (buckets, CUDA graphs and
results).
"""

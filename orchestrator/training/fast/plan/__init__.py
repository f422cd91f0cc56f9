"""Plans an engine before it runs: which trials it can hold, how much memory they take, how many train together.

- `eligibility`: whether the fast engine can hold a trial on its base.
- `engine_spec`: what all trials of one engine share.
- `memory`: the arithmetic of GPU memory.
- `memory_plan`: ways to hold trials that fit into this process's memory, and the number of slots.
- `factory`: builds engines and caches them on their base.
"""

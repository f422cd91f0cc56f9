"""Foresees a sweep before it runs: memory, time, GPU hours, price and disk.

Reading order, from the entry point down:

- `sweep_plan`: `plan_sweep` puts the parts together; `models` has what it returns.
- `probe`: measures a few steps of the extreme corners on this machine.
- `corners`: the memory of each corner of the space, and how many trials train together.
- `fit`: whether a trial fits into memory; a sweep that drops trials that do not (`search.skip_unfit`) asks it.
- `makespan`: the time of all trials on the GPUs, with and without a stopping rule.
- `answers`: the time and memory of generated answers.
- `trials`: the trials of a sweep as they may be drawn, their steps and rungs. `saved_tokens`: what stopping rules save.
- `disk`: what a sweep writes.
- `step_time`, `gpus`: the time of a pass on a GPU.
- `doubts`: what is valid, but probably not meant. `check` says the same; the module imports no ML library.
"""

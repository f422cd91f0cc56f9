"""What the records of a sweep say: frames, forecast outcomes, importances, costs, and the verdict in words.

Reading order: `sweep_data` (everything that could be read, and what could not), `outcomes` (the value that each trial
has, or is forecast to have, at its end), `longer` (what twice the steps would bring), `effects` and `importance` (what
each field does), `cost`, `frames` (tables for pandas), `next_step` (commands), `coverage` (which values were tried) and
`verdict` (the sentences).
Nothing here draws: figures and pages are in `orchestrator.page`.
"""

"""The points of the search space that trials run at.

Everything here runs in the driver's main thread, and is pickled with Tune's state.

Reading order: `space` (draws, encoded points), `drawn_points` (no point twice), one module for each algorithm
(`grid_random`, `optuna`, `hyperopt`, `bohb`), `ending`, which says when a sweep draws no further trial, and `factory`,
which makes the algorithm that an experiment asks for.
`hyperopt` and `bohb` need extras; `factory` imports them only where the experiment asks for them.
"""

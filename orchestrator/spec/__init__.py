"""Experiment files: what a person writes, read and checked without any ML library.

Reading order: `sections` (the fields, one module a section), `search` and `axes` (the search space), `sweep_spec` (the
whole experiment), `load` (from a YAML file to a checked `SweepSpec`). What checks an experiment: `cross_checks` (rules
between sections), `axis_checks` (every value of the search space), `scheduler_effect` (schedulers that would do
nothing), `optional_packages`. What messages are made of: `messages`, `suggestions`. `manual` prints the reference.
"""

from orchestrator.spec.load import load_spec, parse_spec
from orchestrator.spec.sections import TrialConfig
from orchestrator.spec.sweep_spec import SweepSpec

__all__ = ["SweepSpec", "TrialConfig", "load_spec", "parse_spec"]

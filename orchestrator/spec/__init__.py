"""What a person writes: experiment files, read without any ML library."""

from orchestrator.spec.load import load_spec, parse_spec
from orchestrator.spec.sections import TrialConfig
from orchestrator.spec.sweep_spec import SweepSpec

__all__ = ["SweepSpec", "TrialConfig", "load_spec", "parse_spec"]

"""Types of the 16-bit weights of merged models."""

from typing import Literal

from orchestrator.spec.sections import BaseSection

Dtype = Literal["bf16", "fp16"]

DTYPES: dict[Dtype, str] = {"bf16": "bfloat16", "fp16": "float16"}
"""Name on the command line -> torch's name."""


def default_dtype(base: BaseSection) -> Dtype:
    """Return the type of the 16-bit forms of an adapter on this base: its `compute_dtype`, or bf16 for float32."""
    return "fp16" if base.compute_dtype == "float16" else "bf16"

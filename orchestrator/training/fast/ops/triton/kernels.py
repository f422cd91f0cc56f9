"""All operations in Triton: this module satisfies `protocol.Ops`."""

from orchestrator.training.fast.ops.triton.adamw import update
from orchestrator.training.fast.ops.triton.attention import attention, attention_backward
from orchestrator.training.fast.ops.triton.lora_backward import lora_backward
from orchestrator.training.fast.ops.triton.lora_forward import lora_down, lora_up_
from orchestrator.training.fast.ops.triton.norm_glu_ce import (
    add_norm,
    add_norm_backward,
    cross_entropy,
    glu,
    glu_backward,
    sum_by_slot,
)
from orchestrator.training.fast.ops.triton.qk_norm import qk_norm, qk_norm_backward_

__all__ = [
    "TILE",
    "add_norm",
    "add_norm_backward",
    "attention",
    "attention_backward",
    "cross_entropy",
    "glu",
    "glu_backward",
    "lora_backward",
    "lora_down",
    "lora_up_",
    "qk_norm",
    "qk_norm_backward_",
    "sum_by_slot",
    "update",
]

TILE = 64
"""Tokens of a tile."""

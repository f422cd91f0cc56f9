"""Autocast of the forward pass, for this process's device."""

from orchestrator.spec.sections import TrainingSection


def resolve_precision(training: TrainingSection) -> str:
    """bf16, fp16 or none."""
    import torch

    if training.precision != "auto":
        return training.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "none"

"""Types of weights and products, for this process's device."""

from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import TrainingSection


def resolve_precision(training: TrainingSection) -> str:
    """Autocast of the forward pass: bf16, fp16 or none."""
    import torch

    if training.precision != "auto":
        return training.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "none"


def require_device(config: TrialConfig) -> None:
    """Find out whether a trial can train on this process's device.

    Raises:
        TrialError: it cannot.
    """
    import torch

    training, has_gpu = config.training, torch.cuda.is_available()
    if training.precision == "fp16" and not has_gpu:
        raise TrialError(
            "training.precision fp16 scales its gradients on a GPU, and this process has none",
            "Use auto, bf16 or none.",
        )
    if training.tf32 and not (has_gpu and torch.cuda.get_device_capability() >= (8, 0)):
        raise TrialError(
            "training.tf32 needs an NVIDIA GPU of Ampere or later, and this process has none", "Set it off."
        )
    if config.lora.dora and config.base.quantization == "int8" and not has_gpu:
        raise TrialError(
            "lora.dora on base.quantization int8 needs a GPU: on a CPU PEFT (0.21) loses the scales of 8-bit weights",
            "Take nf4 or none.",
        )
    if reason := config.why_not_under(resolve_precision(training)):
        raise TrialError(reason)

"""The precision of the forward pass, and whether this process's device supports a trial."""

from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import TrainingSection


def resolve_precision(training: TrainingSection, has_bf16: bool | None = None) -> str:
    """Return the autocast dtype of the forward pass: bf16, fp16 or none.

    Args:
        training: the section.
        has_bf16: whether the trial is to run on a GPU with bfloat16; None asks this machine.
    """
    if training.precision != "auto":
        return training.precision
    if has_bf16 is None:
        import torch

        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16" if has_bf16 else "none"


def require_device(config: TrialConfig) -> None:
    """Check that a trial can train on this process's device.

    Raises:
        TrialError: it cannot; the message names the field.
    """
    import torch

    training, has_gpu = config.training, torch.cuda.is_available()
    if not has_gpu and (reason := config.cpu_unsupported_reason()):
        raise TrialError(f"{reason}, and this process has none")
    if training.tf32 and torch.cuda.get_device_capability() < (8, 0):
        raise TrialError("training.tf32 needs an NVIDIA GPU of Ampere or later, and this one is older", "Set it off.")
    if reason := config.precision_unsupported_reason(resolve_precision(training)):
        raise TrialError(reason)

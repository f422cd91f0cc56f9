"""Where a trial's points go: JSONL always; TensorBoard, W&B, MLflow and trackio as views of it."""

from orchestrator.tracking.fan_out import Trackers, open_trackers, wanted

__all__ = ["Trackers", "open_trackers", "wanted"]

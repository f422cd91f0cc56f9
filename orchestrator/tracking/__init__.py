"""Trackers record a trial's metrics: always JSONL, and TensorBoard, W&B, MLflow and trackio as copies of it.

The libraries are imported inside functions, so that a process loads only those of the trackers in use.
"""

from orchestrator.tracking.fan_out import Trackers, open_trackers, wanted

__all__ = ["Trackers", "open_trackers", "wanted"]

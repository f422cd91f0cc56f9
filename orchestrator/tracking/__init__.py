"""Where a trial's points go: JSONL always, TensorBoard and W&B as views of it."""

from orchestrator.tracking.fan_out import Trackers, open_trackers

__all__ = ["Trackers", "open_trackers"]

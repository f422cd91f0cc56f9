"""A distributed experiment orchestrator on Ray for QLoRA fine-tuning."""

__version__ = "0.1.0"

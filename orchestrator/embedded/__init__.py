"""The embedded default: a small pretrained base (`BASE_DIR`), the task that fine-tunes it (`task`), and
the sweep that does so (`EXPERIMENT`)."""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
EXPERIMENT = Path(__file__).parent / "demo.yaml"

"""The embedded default: a small pretrained base (`BASE_DIR`) and the task (`task`) that fine-tunes it."""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"

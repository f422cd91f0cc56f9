"""The embedded default: a small pretrained base, the task that fine-tunes it (`task`), and the sweep that does so.

`BASE_DIR` is the base's folder, `EXPERIMENT` the sweep's experiment file.
"""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
EXPERIMENT = Path(__file__).parent / "demo.yaml"

"""Settings of all tests: no network for the Hugging Face libraries, and the repository as the working directory."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.chdir(Path(__file__).parents[1])  # tests name files such as experiments/demo.yaml from any working directory

"""Settings of all tests: no network, a key of their own, and the repository as the working directory."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["ORCHESTRATOR_STATE_KEY"] = "a key of the tests, not of the home folder"
os.chdir(Path(__file__).parents[1])  # tests name files such as experiments/demo.yaml from any working directory

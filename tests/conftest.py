"""Settings of all tests: the Hugging Face libraries do not use the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

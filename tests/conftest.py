"""Shared by all tests: none of them reaches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

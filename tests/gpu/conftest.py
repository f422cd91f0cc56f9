"""Tests on one GPU, as a worker has it. Commands choose theirs before CUDA starts, which it does once a process."""

import os

_visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = _visible.split(",")[0]

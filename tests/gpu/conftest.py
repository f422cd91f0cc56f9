"""Tests see one GPU, as a worker does. The choice must precede the start of CUDA, which happens once in a process."""

import os

_visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = _visible.split(",")[0]

"""Seconds from the start of a process to its first step, with a cold and a warm kernel cache, against trl (B).

    python -m benchmarks.startup 1.1b --rows train.jsonl

Each start is a process of its own: imports, tokenization, loading, quantization, kernels and one step.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.common import BASELINES, ROOT, Setting, main

CHILD = """
import json, sys, time
marks = {"python": time.time()}
from benchmarks.common import Silent, Setting, run
import torch, transformers, trl, peft, bitsandbytes
marks["imports"] = time.time()
from pathlib import Path
shape, base, rows, training = json.loads(sys.argv[1])
watcher = Silent()
run(Setting(shape, Path(base), Path(rows), Path(".")).spec(training), watcher)
marks["first_step"] = watcher.first_step
print("MARKS", json.dumps(marks), flush=True)
"""


def measure(setting: Setting) -> dict[str, Any]:
    # The very first start reads libraries and base from the disk and is not counted.
    trl, fast = BASELINES["B"], {"engine": "fast"}
    forms = {"disk_cold": trl, "B": trl, "fast_cold": fast, "fast": fast}
    figures = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, training in forms.items():
            asked = [setting.shape, str(setting.base), str(setting.rows), training | {"steps": 2, "eval_steps": 2}]
            environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": _path()}
            start = time.time()
            command = [sys.executable, "-c", CHILD, json.dumps(asked)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise RuntimeError(done.stderr)
            marks = json.loads(done.stdout.split("MARKS", 1)[1])
            figures[name] = {mark: round(at - start, 2) for mark, at in marks.items()}
    return {"marks": figures, **{f"{name}_s": each["first_step"] for name, each in figures.items()}}


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)

"""Cost of `training.reproducible`, and whether bits are the same alone, with other trials and in a second run.

    python -m benchmarks.reproducible 1.1b --rows train.jsonl

The mixed trials of `benchmarks.pack` (16, and 8 at 7B; batch 4) step jointly, then separately twice; two run alone.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.common import Setting, main, together
from benchmarks.pack import SLOTS, points, spec_of, speed
from orchestrator.training.attempt.events import Evaluated, Logged

Reports = list[tuple[int, dict[str, float]]]
"""What one trial reported: steps, each with its losses and norms."""


def measure(setting: Setting) -> dict[str, Any]:
    count = SLOTS[setting.shape]
    forms = {"joint": (range(count), False), "separate": (range(count), True), "again": (range(count), True)}
    forms |= {f"alone_{index}": (range(index, index + 1), True) for index in (0, 3)}  # of rank 8, of rank 64
    speeds, reported = {}, {}
    for name, (which, reproducible) in forms.items():
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # memory lasts as long as the process
            speeds[name], reported[name] = process.submit(_run, setting, list(which), reproducible).result()
        print(name, speeds[name], flush=True)
    alone = {index: reported[f"alone_{index}"][0] for index in (0, 3)}
    return {
        "slots": count,
        "speeds": speeds,
        "separate_over_joint": round(speeds["separate"]["tokens_per_second"] / speeds["joint"]["tokens_per_second"], 3),
        "same_bits_beside_others": all(reported["separate"][index] == each for index, each in alone.items()),
        "same_bits_again": reported["separate"] == reported["again"],
        "joint_differs_at_most": max(
            abs(one[1][name] - other[1][name])
            for index, each in alone.items()
            for one, other in zip(reported["joint"][index], each, strict=True)
            for name in one[1]
            if name.endswith("loss")
        ),
    }


def _run(setting: Setting, which: list[int], reproducible: bool) -> tuple[dict[str, Any], list[Reports]]:
    heard = together(spec_of(setting, reproducible=reproducible), [points()[index] for index in which])
    reported = [
        [(event.step, event.values) for _, event in each if isinstance(event, Logged | Evaluated)] for each in heard
    ]
    return speed(heard), reported


if __name__ == "__main__":
    main(__doc__.splitlines()[0], measure)

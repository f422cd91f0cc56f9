"""LoRA variants and forms of the base at one shape: real tokens a second, peak memory, losses.

    python -m benchmarks.variants 1.1b --rows train.jsonl

Each trains 20 steps in the engine that `auto` chooses. The speed leaves out the steps before the tenth.
"""

from typing import Any

from benchmarks.common import Setting, forget, main, predicted_over_measured, run
from orchestrator.errors import TrialError

FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {},
    "rslora": {"lora": {"rslora": True}},
    "lora trl": {"training": {"engine": "trl"}},
    "dora": {"lora": {"dora": True}},
    "olora": {"lora": {"init": "olora"}},
    "8-bit": {"base": {"quantization": "int8"}},
    "8-bit dora": {"base": {"quantization": "int8"}, "lora": {"dora": True}},
    "16-bit": {"base": {"quantization": "none"}},
    "8-bit adamw": {"training": {"optimizer": "paged_adamw_8bit"}},
}
TRAINING = {"steps": 20, "eval_steps": 10, "eval_batch_size": 8, "logging_steps": 2}


def measure(setting: Setting, forms: list[str] | None) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in forms or FORMS:
        forget()
        sections = dict(FORMS[name])
        try:
            done = run(setting.spec(TRAINING | sections.pop("training", {}), **sections))
        except TrialError as error:  # a CPU cannot train all of them
            figures[name] = {"refused": error.message}
            continue
        losses = [round(point.values["eval/loss"], 5) for point in done.points if "eval/loss" in point.values]
        figures[name] = {
            "engine": done.result.engine,
            "engine_reason": done.result.engine_reason,
            "tokens_per_second": round(done.tokens_per_second(after=10)),
            "peak_gib": done.result.peak_memory_gib,
            "predicted_over_measured": predicted_over_measured(done.result),
            "eval_losses": losses,
            "seconds": round(done.seconds, 1),
        }
        print(name, figures[name], flush=True)
    return {
        "forms": figures,
        "tokens_per_second": " / ".join(str(each.get("tokens_per_second")) for each in figures.values()),
    }


if __name__ == "__main__":
    main(
        __doc__.splitlines()[0],
        measure,
        forms={"nargs": "*", "choices": list(FORMS), "help": "forms to run; all by default"},
    )

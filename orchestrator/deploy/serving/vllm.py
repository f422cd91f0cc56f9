"""The command that serves adapters by vLLM. Options are named as in vLLM 0.33.

It wants other versions of torch and transformers than are pinned here, and so an environment of its own, with its
command on the path. From 0.28 on it holds a base in 4 bits only with `vllm-bnb-plugin` beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from orchestrator.adapters.bundle import CONFIG
from orchestrator.adapters.stops import GENERATION
from orchestrator.base import base_location
from orchestrator.deploy.chat import PromptForm, question_template
from orchestrator.spec.sections import BaseSection

CHAT_TEMPLATE = "chat_template.jinja"
"""File of an adapter folder in which its tokenizer keeps it."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""PEFT's ways to begin that leave the base as it is (`vllm/lora/peft_helper.py`)."""


def vllm_command(base: BaseSection, adapters: Mapping[str, Path], form: PromptForm, host: str, port: int) -> list[str]:
    """`vllm serve` with adapters side by side on their base, greedy unless asked otherwise.

    Args:
        base: of all adapters.
        adapters: their folders by the names they are asked by, of ranks up to the last of `RANKS`.
        form: of their questions.
        host: address to listen on.
        port: its port.
    """
    command = ["vllm", "serve", base_location(base), "--served-model-name", base.model, "--dtype", base.compute_dtype]
    if base.revision is not None:
        command += ["--revision", base.revision]
    if base.trust_remote_code:
        command.append("--trust-remote-code")
    if base.quantization != "none":
        command += ["--quantization", "bitsandbytes"]
    if not form.takes_turns:
        command += ["--chat-template", question_template(form)]
    elif form.data and form.data.chat_template:  # else it takes that of the base
        command += ["--chat-template", str((next(iter(adapters.values())) / CHAT_TEMPLATE).resolve())]
    modules = [json.dumps({"name": name, "path": str(path.resolve())}) for name, path in adapters.items()]
    command += ["--enable-lora", "--max-loras", str(len(modules))]
    largest = max(map(largest_rank, adapters.values()))
    command += ["--max-lora-rank", str(next(rank for rank in RANKS if rank >= largest)), "--lora-modules", *modules]
    folder = next(iter(adapters.values())).resolve()
    if (folder / GENERATION).is_file():  # vLLM stops at its eos_token_id; else it reads the base's
        command += ["--generation-config", str(folder)]
    command += ["--override-generation-config", '{"temperature": 0}']
    return [*command, "--host", host, "--port", str(port)]


def more_than_lora(adapter: Path) -> str | None:
    """What an adapter has that vLLM does not take beside LoRA's matrices, or None."""
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    init, kind = config.get("init_lora_weights"), config.get("peft_type", "LORA")
    has = {
        f"parts of {kind}": kind != "LORA",
        "DoRA's magnitudes": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "modules that trained whole": config.get("modules_to_save"),
        "trained tokens": config.get("trainable_token_indices"),
        f"a base that {init} has changed": isinstance(init, str) and init.lower() not in _PLAIN_STARTS,
    }
    return next((what for what, is_there in has.items() if is_there), None)


def largest_rank(adapter: Path) -> int:
    """Of an adapter's modules, by its LoRA configuration."""
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    largest: int = max([config["r"], *config.get("rank_pattern", {}).values()])
    return largest

"""The command that serves adapters with vLLM. Options are named as in vLLM 0.33.

vLLM needs other versions of torch and transformers than this package, so it must be installed in its own environment,
with its command on PATH. Since 0.28 it loads a base in 4 bits only if `vllm-bnb-plugin` is installed as well.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from orchestrator.adapters.peft_config import largest_rank, read_peft_config
from orchestrator.adapters.stops import GENERATION
from orchestrator.base_folder import base_location
from orchestrator.deploy.chat import PromptForm, question_template
from orchestrator.spec.sections import BaseSection

CHAT_TEMPLATE = "chat_template.jinja"
"""An adapter folder's file with the chat template of its tokenizer."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that `--max-lora-rank` accepts."""

_SUPPORTED_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""PEFT's initializations that do not change the base (`vllm/lora/peft_helper.py`)."""


def vllm_command(base: BaseSection, adapters: Mapping[str, Path], form: PromptForm, host: str, port: int) -> list[str]:
    """Build the command line of `vllm serve`, with adapters on their common base. Answers are greedy by default.

    Args:
        base: base of all adapters.
        adapters: model name -> adapter folder; no rank may exceed the last of `RANKS`.
        form: prompt form of the adapters.
        host: address to listen on.
        port: port to listen on.
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
    elif form.data and form.data.chat_template:  # otherwise vLLM uses the template of the base
        command += ["--chat-template", str((next(iter(adapters.values())) / CHAT_TEMPLATE).resolve())]
    modules = [json.dumps({"name": name, "path": str(path.resolve())}) for name, path in adapters.items()]
    command += ["--enable-lora", "--max-loras", str(len(modules))]
    largest = max(map(largest_rank, adapters.values()))
    command += ["--max-lora-rank", str(next(rank for rank in RANKS if rank >= largest)), "--lora-modules", *modules]
    folder = next(iter(adapters.values())).resolve()
    if (folder / GENERATION).is_file():  # vLLM stops at its eos_token_id; by default it reads the base's file
        command += ["--generation-config", str(folder)]
    command += ["--override-generation-config", '{"temperature": 0}']
    return [*command, "--host", host, "--port", str(port)]


def more_than_lora(adapter: Path) -> str | None:
    """Name a part of an adapter that vLLM does not support, other than LoRA matrices; None if there is none."""
    config = read_peft_config(adapter)
    init, kind = config.get("init_lora_weights"), config.get("peft_type", "LORA")
    parts = {
        f"parts of {kind}": kind != "LORA",
        "DoRA's magnitudes": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "fully trained modules": config.get("modules_to_save"),
        "trained tokens": config.get("trainable_token_indices"),
        "adapted experts": config.get("target_parameters"),
        f"a base that was changed by {init}": isinstance(init, str) and init.lower() not in _SUPPORTED_INITS,
    }
    return next((part for part, is_present in parts.items() if is_present), None)

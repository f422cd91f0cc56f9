"""Use what a sweep has trained: choose an adapter, evaluate it, export it, serve it, and chat with it.

Modules, lowest layer first (`pyproject.toml` enforces this order):

    dtypes        types of 16-bit weights
    recommend     which adapter to take: paired bootstrap, ties, Pareto set
    adapter_ref   `AdapterRef`: an adapter folder, its base and its configuration
    load          base + adapter -> `PeftModel`, tokenizer, stop tokens
    finished      `FinishedSweep`, `ChosenTrial`: the trials of a sweep, and its best adapter
    clean         frees the disk of what ended sweeps no longer need
    find          resolves what a user named to one of these
    chat          prompts in the form of the training rows; streamed answers
    side_by_side  the base and the best adapter, asked the same held-out prompts
    prompts       questions from a file, answers to a file
    serving/      HTTP server with OpenAI's protocol
    scoring/      metrics of an adapter in each form it may be deployed in
    export/       merged models, GGUF and Ray Serve exports, their check, and `push`

Imports of torch, transformers, peft and bitsandbytes stand inside functions: each takes seconds, and most commands
need none of them. Start reading at `finished`.
"""

from orchestrator.deploy.finished import ChosenTrial, FinishedSweep, open_sweep

__all__ = ["ChosenTrial", "FinishedSweep", "open_sweep"]

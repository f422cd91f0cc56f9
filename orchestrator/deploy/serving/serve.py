"""Serve the best adapters of a sweep, or one adapter, over HTTP with OpenAI's protocol.

There are two engines:

- vllm, if vLLM is installed and there is a GPU: this process is replaced by `vllm serve`.
- transformers, otherwise: its continuous batching (`adapter_server`) with a small application of our own (`api`).

The application of `transformers serve` (5.23, `transformers/cli/serving`) is not suitable:

- It loads any model from the hub that a request names, but no adapters.
- It writes prompts only with the tokenizer's chat template.
- Its errors do not have OpenAI's format.
- A request may unload the model.
- When it batches, all requests use the temperature of the first.
"""

import errno
import ipaddress
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import Literal, assert_never

from orchestrator.adapters.peft_config import largest_rank
from orchestrator.base_folder import stored_quantization
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.chat import open_prompt_form
from orchestrator.deploy.find import find_adapter, find_sweep, is_adapter
from orchestrator.deploy.serving.adapter_server import AdapterServer, open_adapter_servers
from orchestrator.deploy.serving.vllm import RANKS, more_than_lora, vllm_command
from orchestrator.errors import RequestError
from orchestrator.spec.optional_packages import require_package
from orchestrator.spec.sections import BaseSection

Engine = Literal["vllm", "transformers"]

TOKEN = "ORCHESTRATOR_TOKEN"
"""Environment variable for the token."""

_GRACE_S = 5
"""Time that active requests have to finish when the server shuts down."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter with the model names that clients may send for it."""

    names: list[str]
    adapter: AdapterRef


@dataclass(frozen=True)
class Service:
    """A validated plan of what to serve, and where. No model is loaded yet."""

    served_adapters: list[ServedAdapter]
    engine: Engine
    engine_reason: str
    """Why this engine was chosen."""
    listening: socket.socket
    host: str
    token: str | None
    """Bearer token that requests must send; None if none is needed."""
    token_is_new: bool
    """Whether the token was generated for this service, so that the user does not know it yet."""

    @property
    def names(self) -> list[str]:
        return [name for served in self.served_adapters for name in served.names]

    def describe(self) -> str:
        """Describe address, models and an example request. The text contains the token only if it was generated."""
        port = self.listening.getsockname()[1]
        shown = f"[{self.host}]" if ":" in self.host else self.host or "0.0.0.0"
        # A generated token is not in the user's environment.
        known = self.token if self.token_is_new else f"${TOKEN}"
        bearer = f' -H "Authorization: Bearer {known}"' if self.token else ""
        asked = f'{{"model": "{self.names[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        lines = [
            f"engine: {self.engine} ({self.engine_reason})",
            f"models: {', '.join(self.names)}",
            f"url:    http://{shown}:{port}/v1",
            *(
                [f"token:  {self.token} (generated for this server; set {TOKEN} to choose one)"]
                if self.token_is_new
                else []
            ),
            f"try:    curl http://{shown}:{port}/v1/chat/completions -H 'Content-Type: application/json'{bearer} "
            f"-d '{asked}'",
        ]
        return "\n".join(lines)


def plan_service(
    sweep_or_adapter: str,
    output: str = "runs",
    top: int = 1,
    engine: Engine | Literal["auto"] = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Service:
    """Validate a service before any model is loaded, and bind its port.

    Args:
        sweep_or_adapter: a sweep, or an adapter folder.
        output: folder that holds sweeps.
        top: number of adapters of a sweep to serve, best first.
        engine: `auto` chooses vLLM if it can serve these adapters, else transformers.
        host: address to listen on. Any address but loopback needs a token; one is generated if none is given.
        port: port to listen on; 0 chooses a free one.
        token: bearer token that requests must send.
        trust_remote_code: see `find_adapter`.

    Raises:
        RecordError: there is no such sweep or adapter, or an adapter is incomplete or changed.
        RequestError: the adapters cannot be served with these options.
    """
    served_adapters = _find_adapters(sweep_or_adapter, output, top, trust_remote_code)
    chosen, reason = _choose_engine(engine, [served.adapter for served in served_adapters], host)
    if chosen == "transformers":
        for package in ("fastapi", "uvicorn"):
            require_package(package, "serve", "serve")
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise RequestError("--token: must be printable ASCII, not empty, and without whitespace at its ends")
    token_is_new = token is None and not _is_loopback(host)
    token = secrets.token_urlsafe(32) if token_is_new else token
    return Service(served_adapters, chosen, reason, _listen(host, port), host, token, token_is_new)


def run_service(service: Service, say: Callable[[str], None], quiet: AbstractContextManager[None]) -> None:
    """Serve until Ctrl-C. With the engine vllm this does not return: vLLM replaces the process.

    Args:
        service: from `plan_service`.
        say: reports the address; with the engine transformers, once requests are answered.
        quiet: entered while libraries load, to suppress their output.

    Raises:
        RequestError: the engine cannot serve these adapters.
    """
    match service.engine:
        case "vllm":
            with quiet:
                command, environment = _vllm_call(service)
            say(service.describe())
            service.listening.close()
            os.execvpe(command[0], command, environment)
        case "transformers":
            with ExitStack() as stack:
                with quiet:
                    adapters = [served.adapter for served in service.served_adapters]
                    servers = stack.enter_context(open_adapter_servers(adapters))
                say(service.describe())
                if note := servers[0].note:
                    say(f"note:   {note}")
                _answer_requests(service, servers)
        case _:
            assert_never(service.engine)


def _vllm_call(service: Service) -> tuple[list[str], dict[str, str]]:
    """Build vLLM's command line and environment. The token is in the environment, as every user can read the former."""
    adapters = {name: served.adapter.folder for served in service.served_adapters for name in served.names}
    form, port = open_prompt_form(service.served_adapters[0].adapter), service.listening.getsockname()[1]
    command = vllm_command(service.served_adapters[0].adapter.base, adapters, form, service.host, port)
    return command, os.environ | ({"VLLM_API_KEY": service.token} if service.token else {})


def _answer_requests(service: Service, servers: Sequence[AdapterServer]) -> None:
    import uvicorn

    from orchestrator.deploy.serving.api import create_app

    pairs = zip(service.served_adapters, servers, strict=True)
    models = {name: server for served, server in pairs for name in served.names}
    app = create_app(models, service.token)
    config = uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=_GRACE_S)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after a clean shutdown
        uvicorn.Server(config).run(sockets=[service.listening])


def _find_adapters(sweep_or_adapter: str, output: str, top: int, trust_remote_code: bool) -> list[ServedAdapter]:
    if is_adapter(sweep_or_adapter):
        if top > 1:
            raise RequestError(
                f"--top {top}: {sweep_or_adapter} is a single adapter", "Give a sweep, or leave --top out."
            )
        adapter = find_adapter(sweep_or_adapter, output, trust_remote_code)
        return [ServedAdapter([adapter.name], adapter)]
    sweep = find_sweep(sweep_or_adapter, output)
    best = sweep.best().adapter_ref().trusted(trust_remote_code)
    others = [trial for trial in sweep.top(top) if trial.trial_id != best.name]
    adapters = [
        best,
        *(AdapterRef.of_trial(sweep.record, trial).trusted(trust_remote_code) for trial in others[: top - 1]),
    ]
    if len({adapter.base for adapter in adapters}) > 1:
        raise RequestError(f"--top {top}: these trials have different bases", "Serve them one by one.")
    return [
        ServedAdapter([adapter.name, *([sweep.record.paths.name] if adapter is best else [])], adapter)
        for adapter in adapters
    ]


def _choose_engine(engine: Engine | Literal["auto"], adapters: Sequence[AdapterRef], host: str) -> tuple[Engine, str]:
    """Return the engine and the reason for it."""
    if engine == "transformers":
        return engine, "as requested"
    fault = _why_not_vllm(adapters, host)
    if engine == "vllm":
        if fault:
            raise RequestError(f"--engine vllm: {fault}", "`--engine transformers` can serve this.")
        return engine, "as requested"
    if fault is None and not _has_gpu():
        fault = "there is no GPU"
    return ("transformers", fault) if fault else ("vllm", "it is installed, and there is a GPU")


def _why_not_vllm(adapters: Sequence[AdapterRef], host: str) -> str | None:
    base = adapters[0].base
    if shutil.which("vllm") is None:
        return "vLLM is not installed: there is no command vllm on PATH"
    if fault := _unsupported_quantization(base):
        return fault
    if base.compute_dtype == "float32" and _has_gpu():
        # vllm/lora/ops/triton_ops/lora_shrink_op.py; on a CPU, vLLM supports float32
        return "vLLM's LoRA kernels on a GPU support only 16-bit types, but base.compute_dtype is float32"
    for adapter in adapters:
        if more := more_than_lora(adapter.folder):
            return f"vLLM supports plain LoRA, but {adapter.name} has {more} (merge it: `export --format merged`)"
        if (rank := largest_rank(adapter.folder)) > RANKS[-1]:
            return f"vLLM supports adapters up to rank {RANKS[-1]}, but {adapter.name} has rank {rank}"
    if not _is_loopback(host):
        # docs.vllm.ai, usage/security
        return "vLLM's token does not protect /invocations, /pause and others; on a public address it needs a proxy"
    return None


def _unsupported_quantization(base: BaseSection) -> str | None:
    stored = stored_quantization(base)
    if stored is not None and stored.is_dequantized and base.quantization != "none":
        return f"vLLM loads files of {stored.method} as they are, but this base was quantized again for training"
    match base.quantization:
        case "none":
            return None
        case "nf4" if base.double_quant:
            return None
        case "nf4" | "fp4":
            return "vLLM loads a 4-bit base only as NF4 with double quantization, but this base was trained otherwise"
        case "int8":
            return "vLLM does not support the 8-bit quantization of bitsandbytes (base.quantization int8)"
        case _:
            assert_never(base.quantization)


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


def _listen(host: str, port: int) -> socket.socket:
    """Bind the port now; clients that connect before the model is loaded wait for their answer."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        raise RequestError(
            f"--port {port}: cannot listen on {host}: {error.strerror or error}",
            "`--port 0` chooses a free port." if is_taken else "",
        ) from error
    # asyncio sets TCP_NODELAY only on sockets that it creates; without it, each answer waits 40 ms for an ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening

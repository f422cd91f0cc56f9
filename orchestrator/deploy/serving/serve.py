"""Serve the best adapters of a sweep, or one adapter, behind OpenAI's protocol.

Two engines. vLLM, where it is installed and there is a GPU: this process becomes `vllm serve`. Else transformers, here:
its continuous batching (`deploy.served`) under a small application of our own (`deploy.api`). The application of
`transformers serve` (5.23, `transformers/cli/serving`) is not used: it loads models by itself, any that a request names
from the hub, and no adapters; writes messages by the tokenizer's chat template alone; its errors are not OpenAI's; a
request may unload the model; and once it batches, all requests have the temperature of the first.
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
from typing import Literal

from orchestrator.deploy.adapter_ref import AdapterRef, find_adapter, find_sweep, is_adapter
from orchestrator.deploy.chat import open_prompt_form
from orchestrator.deploy.serving.served import AdapterServer, open_served
from orchestrator.deploy.serving.vllm import RANKS, largest_rank, more_than_lora, vllm_command
from orchestrator.errors import RequestError
from orchestrator.spec.optional_packages import require_package

Engine = Literal["vllm", "transformers"]

TOKEN = "ORCHESTRATOR_TOKEN"
"""Environment variable that may hold the token."""

_GRACE_S = 5
"""What requests under way have when the server is to end."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter, and the names it is asked by."""

    names: list[str]
    subject: AdapterRef


@dataclass(frozen=True)
class Service:
    """What is to be served, where, and to whom: found to be possible, with nothing loaded yet."""

    offers: list[ServedAdapter]
    engine: Engine
    why: str
    """Of the engine."""
    listening: socket.socket
    host: str
    token: str | None
    """That requests must bear."""
    token_is_new: bool
    """Made here, and not known to anyone yet."""

    @property
    def names(self) -> list[str]:
        return [name for offer in self.offers for name in offer.names]

    def describe(self) -> str:
        """Where it is, what it serves, and how it is asked. Holds the token only if it was made here."""
        port = self.listening.getsockname()[1]
        shown = f"[{self.host}]" if ":" in self.host else self.host or "0.0.0.0"
        # One that was made here is in nobody's environment.
        known = self.token if self.token_is_new else f"${TOKEN}"
        bearer = f' -H "Authorization: Bearer {known}"' if self.token else ""
        asked = f'{{"model": "{self.names[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        lines = [
            f"engine: {self.engine} ({self.why})",
            f"models: {', '.join(self.names)}",
            f"url:    http://{shown}:{port}/v1",
            *([f"token:  {self.token} (made for this server; or give one in {TOKEN})"] if self.token_is_new else []),
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
    """Find out all that can be known before anything is loaded, and take the port.

    Args:
        sweep_or_adapter: a sweep, or an adapter folder.
        output: folder that holds sweeps.
        top: adapters of a sweep to serve side by side, best first.
        engine: `auto` takes vLLM where it can serve this, else transformers.
        host: address to listen on. Any but the loopback needs a token, which is made if none is given.
        port: 0 takes a free one.
        token: that requests must bear.
        trust_remote_code: see `find_adapter`.

    Raises:
        RecordError: there is no such sweep or adapter, or it is not whole.
        RequestError: it cannot be served so.
    """
    offers = _offers(sweep_or_adapter, output, top, trust_remote_code)
    chosen, why = _choose_engine(engine, [offer.subject for offer in offers], host)
    if chosen == "transformers":
        for package in ("fastapi", "uvicorn"):
            require_package(package, "serve", "serve")
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise RequestError("the token must be printable ASCII without space at its ends, and not empty")
    made = token is None and not _is_loopback(host)
    listening = _listen(host, port)
    return Service(offers, chosen, why, listening, host, secrets.token_urlsafe(32) if made else token, made)


def run_service(service: Service, say: Callable[[str], None], quiet: AbstractContextManager[None]) -> None:
    """Serve until Ctrl-C. With the engine vllm this does not return: vLLM takes the process over.

    Args:
        service: what was planned.
        say: hears where it is, once it answers.
        quiet: entered while libraries load, which talk much.

    Raises:
        RequestError: the engine cannot serve these adapters.
    """
    if service.engine == "vllm":
        with quiet:
            command, environment = _vllm_call(service)
        say(service.describe())
        service.listening.close()
        os.execvpe(command[0], command, environment)
    with ExitStack() as stack:
        with quiet:
            served = stack.enter_context(open_served([offer.subject for offer in service.offers]))
        say(service.describe())
        _answer_requests(service, served)


def _vllm_call(service: Service) -> tuple[list[str], dict[str, str]]:
    """vLLM's command line and environment. The token is in the latter: everyone on the machine can read the former."""
    adapters = {name: offer.subject.adapter for offer in service.offers for name in offer.names}
    form, port = open_prompt_form(service.offers[0].subject), service.listening.getsockname()[1]
    command = vllm_command(service.offers[0].subject.base, adapters, form, service.host, port)
    return command, os.environ | ({"VLLM_API_KEY": service.token} if service.token else {})


def _answer_requests(service: Service, served: Sequence[AdapterServer]) -> None:
    import uvicorn

    from orchestrator.deploy.serving.api import create_app

    models = {name: each for offer, each in zip(service.offers, served, strict=True) for name in offer.names}
    app = create_app(models, service.token)
    config = uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=_GRACE_S)
    with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended in good order
        uvicorn.Server(config).run(sockets=[service.listening])


def _offers(sweep_or_adapter: str, output: str, top: int, trust_remote_code: bool) -> list[ServedAdapter]:
    if is_adapter(sweep_or_adapter):
        if top > 1:
            raise RequestError(f"--top {top}: {sweep_or_adapter} is one adapter", "Give a sweep.")
        subject = find_adapter(sweep_or_adapter, output, trust_remote_code)
        return [ServedAdapter([subject.name], subject)]
    sweep = find_sweep(sweep_or_adapter, output)
    best = AdapterRef.of_best(sweep.best())
    others = [trial for trial in sweep.top(top) if trial.trial_id != best.name]
    subjects = [best, *(AdapterRef.of_trial(sweep.record, trial) for trial in others[: top - 1])]
    if len({subject.base for subject in subjects}) > 1:
        raise RequestError(f"--top {top}: these trials stand on different bases", "Serve them one by one.")
    return [
        ServedAdapter([subject.name, *([sweep.record.paths.name] if subject is best else [])], subject)
        for subject in subjects
    ]


def _choose_engine(engine: Engine | Literal["auto"], subjects: Sequence[AdapterRef], host: str) -> tuple[Engine, str]:
    """The engine, and why it is this one."""
    if engine == "transformers":
        return engine, "as asked"
    fault = _why_not_vllm(subjects, host)
    if engine == "vllm":
        if fault:
            raise RequestError(f"--engine vllm: {fault}", "`--engine transformers` can serve this.")
        return engine, "as asked"
    if fault is None and not _has_gpu():
        fault = "there is no GPU"
    return ("transformers", fault) if fault else ("vllm", "it is installed, and there is a GPU")


def _why_not_vllm(subjects: Sequence[AdapterRef], host: str) -> str | None:
    base = subjects[0].base
    if shutil.which("vllm") is None:
        return "vLLM is not installed: there is no command of that name"
    if base.quantization == "fp4" or (base.quantization == "nf4" and not base.double_quant):
        return "vLLM holds a 4-bit base as NF4 with double quantisation, and this one was trained on in another form"
    if base.quantization == "int8":
        return "vLLM quantises no base to 8 bits as bitsandbytes does, and this one was trained on so"
    if base.compute_dtype == "float32" and _has_gpu():
        # vllm/lora/ops/triton_ops/lora_shrink_op.py; on a CPU it takes them
        return "vLLM's LoRA kernels on a GPU take 16-bit products, and this base was trained on with float32"
    for subject in subjects:
        if more := more_than_lora(subject.adapter):
            return f"vLLM takes plain LoRA, and {subject.name} has {more} (merge it: `export --format merged`)"
        if (rank := largest_rank(subject.adapter)) > RANKS[-1]:
            return f"vLLM takes adapters up to rank {RANKS[-1]}, and {subject.name} has {rank}"
    if not _is_loopback(host):
        # docs.vllm.ai, usage/security
        return (
            "vLLM's token does not guard /invocations, /pause and others: off the loopback it needs a proxy before it"
        )
    return None


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _listen(host: str, port: int) -> socket.socket:
    """Take the port at once; who connects early waits for the first answer."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise RequestError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            "`--port 0` takes a free one." if taken else "",
        ) from error
    # asyncio sets it on sockets of its own making; without, each answer waits 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening

"""HTTP application with OpenAI's protocol: models, chat completions, completions, and a health check.

Unsupported fields are rejected, not ignored. A response has one choice, prompts and answers are text, and the default
of `temperature` is 0.
"""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from hmac import compare_digest
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.deploy.chat import Sampling
from orchestrator.deploy.serving.adapter_server import AdapterServer, AnswerPiece
from orchestrator.errors import OrchestratorError, RequestError

Document = dict[str, Any]

NEUTRAL_VALUES: Mapping[str, list[Any]] = {
    "best_of": [1],
    "echo": [False],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "metadata": [{}],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "store": [False],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "verbosity": ["medium"],
}
"""OpenAI's other fields with their neutral values, which clients send by default. Null is neutral in every field."""


def _text(given: str) -> str:
    """Reject text that cannot be encoded: JSON's escapes may contain a lone surrogate."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("half_character", "contains a lone surrogate") from error
    return given


def _listed(given: Any) -> Any:
    """Convert a single text to a list. With a union type, pydantic would report the errors of each branch."""
    if isinstance(given, str):
        return [_text(given)]
    if not isinstance(given, list):
        raise PydanticCustomError("text_or_list", "Input should be a string or a list")
    return given


def _parts(given: Any) -> Any:
    """Convert the content of a message to a list of parts."""
    listed = _listed(given)
    return [{"type": "text", "text": text} for text in listed] if isinstance(given, str) else listed


_Text = Annotated[str, AfterValidator(_text)]
_Count = Annotated[int, Field(ge=1)] | None
_One = Annotated[int, Field(ge=1, le=1)] | None  # Literal[1] would also accept true
_Zero = Annotated[float, Field(ge=0, le=0)] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _StreamOptions(_Strict):
    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class _Request(_Strict):
    """Fields of both kinds of completion. The last three do not influence the answer."""

    model: str
    max_tokens: _Count = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Annotated[list[_Text], Field(max_length=4), BeforeValidator(_listed)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: _One = None
    presence_penalty: _Zero = None
    frequency_penalty: _Zero = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, given: Any) -> Any:
        """Drop fields with neutral values. Other values of these fields are rejected, like unknown fields."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if not _is_neutral(name, value)}

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, seed=self.seed)

    @property
    def stops(self) -> list[str]:
        return [stop for stop in self.stop or [] if stop]


def _is_neutral(name: str, value: Any) -> bool:
    # Types are compared too: False == 0, but `logprobs: 0` requests the log probabilities of the answer's tokens.
    return value is None or any(type(value) is type(each) and value == each for each in NEUTRAL_VALUES.get(name, []))


class _TextPart(BaseModel):
    type: Literal["text"]
    text: _Text


class _Message(BaseModel):
    """A turn. Unknown fields are ignored, as clients send back all fields of an answer. Tool calls are rejected."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_TextPart], BeforeValidator(_parts)]
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None

    @property
    def turn(self) -> dict[str, str]:
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: _Count = None


class TextRequest(_Request):
    prompt: _Text


class Guard:
    """Rejects requests without the token, except those for `/health`."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "http" and scope["path"] != "/health" and not compare_digest(given, self._expected):
            refusal = _error(401, "the token is missing or wrong", code="invalid_api_key")
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


@dataclass(frozen=True)
class _Shape:
    """Response format of one kind of completion."""

    prefix: str
    """Prefix of the response's id."""
    whole_object: str
    part_object: str
    max_tokens: int
    """Default for requests that do not set it."""
    whole: Callable[[str], Document]
    part: Callable[[str], Document]
    opening: Document
    """First streamed part, before any text."""
    strip: bool
    """Whether to strip whitespace at both ends of the answer, which belongs to the format of the rows."""


_CHAT = _Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    1024,
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text}},
    {"delta": {"role": "assistant", "content": ""}},
    strip=True,
)
_TEXT = _Shape(
    "cmpl",
    "text_completion",
    "text_completion",
    16,  # as OpenAI
    lambda text: {"text": text},
    lambda text: {"text": text},
    {"text": ""},
    strip=False,
)


def create_app(models: Mapping[str, AdapterServer], token: str | None) -> ASGIApp:
    """Build the ASGI application.

    Args:
        models: model name -> started server.
        token: bearer token that requests must send; None to accept all requests.
    """
    app = FastAPI(openapi_url=None)
    _answer_errors(app)
    created = int(time.time())
    listed = {name: {"id": name, "object": "model", "created": created, "owned_by": "orchestrator"} for name in models}

    @app.get("/health")
    def health() -> Response:
        dead = [name for name, server in models.items() if not server.alive]
        return (
            _error(503, f"{', '.join(dead)}: no longer answers; restart the server")
            if dead
            else JSONResponse({"status": "ok"})
        )

    @app.get("/v1/models")
    def list_models() -> Response:
        return JSONResponse({"object": "list", "data": list(listed.values())})

    @app.get("/v1/models/{name}")
    def show_model(name: str) -> Response:
        return JSONResponse(listed[name]) if name in listed else _no_model(name, models)

    @app.post("/v1/chat/completions")
    async def complete_chat(asked: ChatRequest, request: Request) -> Response:
        if (server := models.get(asked.model)) is None:
            return _no_model(asked.model, models)
        ids = server.form.ids([message.turn for message in asked.messages])
        return await _complete(request, server, ids, asked, asked.max_completion_tokens or asked.max_tokens, _CHAT)

    @app.post("/v1/completions")
    async def complete_text(asked: TextRequest, request: Request) -> Response:
        if (server := models.get(asked.model)) is None:
            return _no_model(asked.model, models)
        return await _complete(request, server, server.plain_ids(asked.prompt), asked, asked.max_tokens, _TEXT)

    return Guard(app, token) if token else app


async def _complete(
    request: Request, server: AdapterServer, ids: list[int], asked: _Request, max_tokens: int | None, shape: _Shape
) -> Response:
    """Answer a valid request.

    Raises:
        RequestError: the request cannot be satisfied.
    """
    num_left = server.context - len(ids)
    max_tokens = max_tokens or max(1, min(shape.max_tokens, num_left))
    if not ids:
        raise RequestError("the prompt is empty")
    if max_tokens > num_left:
        raise RequestError(
            f"max_tokens: the prompt has {len(ids)} tokens and the answer may have {max_tokens}; "
            f"their sum must not exceed {server.context}"
        )
    if not server.alive:
        return _error(503, f"{asked.model}: no longer answers; restart the server")
    head = {"id": f"{shape.prefix}-{uuid4().hex}", "created": int(time.time()), "model": asked.model}
    pieces = server.answer(ids, max_tokens, asked.sampling, asked.stops, shape.strip)
    if asked.stream:
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = _events(head | {"object": shape.part_object}, pieces, shape, len(ids) if with_usage else None)
        return StreamingResponse(events, media_type="text/event-stream")
    text, last = "", AnswerPiece("", 0)
    async with aclosing(pieces):
        async for last in pieces:
            text += last.text
            if await request.is_disconnected():  # the client has gone
                break
    choice = _choice(shape.whole(text), last.finish_reason)
    usage = _usage(len(ids), last.num_tokens)
    return JSONResponse(head | {"object": shape.whole_object, "choices": [choice], "usage": usage})


async def _events(
    head: Document, pieces: AsyncGenerator[AnswerPiece, None], shape: _Shape, num_prompt: int | None
) -> AsyncIterator[str]:
    """Yield server-sent events. The last one reports the token usage, unless `num_prompt` is None."""
    yield _event(head | {"choices": [_choice(shape.opening)]})
    last = AnswerPiece("", 0)
    try:
        async with aclosing(pieces):
            async for last in pieces:
                yield _event(head | {"choices": [_choice(shape.part(last.text), last.finish_reason)]})
    except OrchestratorError as error:
        yield _event(_fault(str(error), "server_error"))
        return
    if num_prompt is not None:
        yield _event(head | {"choices": [], "usage": _usage(num_prompt, last.num_tokens)})
    yield "data: [DONE]\n\n"


def _event(document: Document) -> str:
    return f"data: {json.dumps(document)}\n\n"


def _choice(content: Document, finish_reason: str | None = None) -> Document:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(num_prompt: int, num_answer: int) -> Document:
    total = num_prompt + num_answer
    return {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": total}


def _fault(message: str, kind: str, param: str | None = None, code: str | None = None) -> Document:
    """Return an error in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(_fault(message, kind, param, code), status)


def _no_model(name: str, models: Mapping[str, AdapterServer]) -> Response:
    message = f"model: {name!r:.80} is not served here; choose from {', '.join(models)}"
    return _error(404, message, "model", "model_not_found")


def _why_unsupported(field: str) -> str:
    neutral = [json.dumps(value) for value in NEUTRAL_VALUES.get(field, [])]
    return f"is not supported, except as {' or '.join(neutral)}" if neutral else "is not supported"


def _answer_errors(app: FastAPI) -> None:
    """Return every error in OpenAI's format, which its clients expect."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, f"the body is not valid JSON: {first['ctx']['error']} (char {first['loc'][-1]})")
        param = ".".join(str(part) for part in first["loc"] if part != "body")
        fault = _why_unsupported(param) if first["type"] == "extra_forbidden" else first["msg"]
        return _error(400, f"{param or 'the body'}: {fault}", param or None)

    @app.exception_handler(OrchestratorError)
    async def failed(_: Request, error: OrchestratorError) -> Response:
        return _error(400 if isinstance(error, RequestError) else 500, str(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        # Starlette raises the error again after this response, so that it is logged.
        return _error(500, f"the server failed to answer this request ({type(error).__name__}); see its log")

"""The OpenAI protocol over HTTP: models, chat completions, completions; and whether all is well.

What is not understood is refused, and not passed over: one choice, text in and out, `temperature` 0 unless it is given.
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
from orchestrator.deploy.serving.served import AdapterServer, AnswerPiece
from orchestrator.errors import OrchestratorError, RequestError

Document = dict[str, Any]

ASKS_NOTHING: Mapping[str, list[Any]] = {
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
"""OpenAI's other fields, with the values that ask for nothing, as null does in any field: clients send them unasked."""


def _text(given: str) -> str:
    """Text that can be written as bytes. JSON's escapes can also tell half of a character, which cannot."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("half_character", "holds half of a character (a lone surrogate)") from error
    return given


def _listed(given: Any) -> Any:
    """One text as a list of it. (Of a union pydantic would tell the faults of each branch.)"""
    if isinstance(given, str):
        return [_text(given)]
    if not isinstance(given, list):
        raise PydanticCustomError("text_or_list", "Input should be a string or a list")
    return given


def _parts(given: Any) -> Any:
    """A message's content as a list of parts."""
    listed = _listed(given)
    return [{"type": "text", "text": text} for text in listed] if isinstance(given, str) else listed


_Text = Annotated[str, AfterValidator(_text)]
_Count = Annotated[int, Field(ge=1)] | None
_One = Annotated[int, Field(ge=1, le=1)] | None  # of a Literal[1], true would be one too
_Zero = Annotated[float, Field(ge=0, le=0)] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _StreamOptions(_Strict):
    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class _Request(_Strict):
    """What both kinds of completion take; the last fields have no part in an answer."""

    model: str
    max_tokens: _Count = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Annotated[list[_Text], Field(max_length=4), BeforeValidator(_listed)] | None = None
    seed: int | None = None
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
    def _leave_out(cls, given: Any) -> Any:
        """Fields that ask for nothing. What is left of them is refused, as is any that nobody knows."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if not _asks_nothing(name, value)}

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p)

    @property
    def stops(self) -> list[str]:
        return [stop for stop in self.stop or [] if stop]


def _asks_nothing(name: str, value: Any) -> bool:
    # By their types too: False == 0, and `logprobs: 0` asks for those of the tokens themselves.
    return value is None or any(type(value) is type(each) and value == each for each in ASKS_NOTHING.get(name, []))


class _TextPart(BaseModel):
    type: Literal["text"]
    text: _Text


class _Message(BaseModel):
    """A turn. Other fields, which clients send back with an answer, are passed over; but not calls of tools."""

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
    """Lets requests through that bear the token; any may ask for `/health`."""

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
    """How a kind of completion is written down."""

    prefix: str
    """Of its id."""
    whole_object: str
    part_object: str
    max_tokens: int
    """Of an answer for which none are asked."""
    whole: Callable[[str], Document]
    part: Callable[[str], Document]
    opening: Document
    """The part before the first."""
    strip: bool
    """Whether space at the ends belongs to the form of the rows, and not to the answer."""


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
    16,  # OpenAI's
    lambda text: {"text": text},
    lambda text: {"text": text},
    {"text": ""},
    strip=False,
)


def create_app(models: Mapping[str, AdapterServer], token: str | None) -> ASGIApp:
    """An ASGI application.

    Args:
        models: started ones, by the names they are asked by.
        token: that requests must bear; None for none.
    """
    app = FastAPI(openapi_url=None)
    _answer_errors(app)
    created = int(time.time())
    listed = {name: {"id": name, "object": "model", "created": created, "owned_by": "orchestrator"} for name in models}

    @app.get("/health")
    def health() -> Response:
        dead = [name for name, served in models.items() if not served.alive]
        return _error(503, f"{', '.join(dead)}: answers no more") if dead else JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    def list_models() -> Response:
        return JSONResponse({"object": "list", "data": list(listed.values())})

    @app.get("/v1/models/{name}")
    def show_model(name: str) -> Response:
        return JSONResponse(listed[name]) if name in listed else _no_model(name, models)

    @app.post("/v1/chat/completions")
    async def complete_chat(asked: ChatRequest, request: Request) -> Response:
        if (served := models.get(asked.model)) is None:
            return _no_model(asked.model, models)
        ids = served.form.ids([message.turn for message in asked.messages])
        return await _complete(request, served, ids, asked, asked.max_completion_tokens or asked.max_tokens, _CHAT)

    @app.post("/v1/completions")
    async def complete_text(asked: TextRequest, request: Request) -> Response:
        if (served := models.get(asked.model)) is None:
            return _no_model(asked.model, models)
        return await _complete(request, served, served.plain_ids(asked.prompt), asked, asked.max_tokens, _TEXT)

    return Guard(app, token) if token else app


async def _complete(
    request: Request, served: AdapterServer, ids: list[int], asked: _Request, max_tokens: int | None, shape: _Shape
) -> Response:
    """The response to a request that was understood.

    Raises:
        RequestError: it cannot be done.
    """
    room = served.context - len(ids)
    max_tokens = max_tokens or max(1, min(shape.max_tokens, room))
    if not ids:
        raise RequestError("the prompt is empty")
    if max_tokens > room:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, and {max_tokens} are asked for; together they may be {served.context}"
        )
    if asked.seed is not None and asked.sampling.temperature > 0:
        raise RequestError("seed: needs temperature 0; requests that are answered together share their random numbers")
    if not served.alive:
        return _error(503, f"{asked.model}: answers no more")
    head = {"id": f"{shape.prefix}-{uuid4().hex}", "created": int(time.time()), "model": asked.model}
    pieces = served.answer(ids, max_tokens, asked.sampling, asked.stops, shape.strip)
    if asked.stream:
        counted = asked.stream_options is not None and asked.stream_options.include_usage
        events = _events(head | {"object": shape.part_object}, pieces, shape, len(ids) if counted else None)
        return StreamingResponse(events, media_type="text/event-stream")
    text, last = "", AnswerPiece("", 0)
    async with aclosing(pieces):
        async for last in pieces:
            text += last.text
            if await request.is_disconnected():  # nobody waits for it any more
                break
    choice = _choice(shape.whole(text), last.finish_reason)
    usage = _usage(len(ids), last.num_tokens)
    return JSONResponse(head | {"object": shape.whole_object, "choices": [choice], "usage": usage})


async def _events(
    head: Document, pieces: AsyncGenerator[AnswerPiece, None], shape: _Shape, num_prompt: int | None
) -> AsyncIterator[str]:
    """Server-sent events; with the tokens used at the end, unless `num_prompt` is None."""
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


def _choice(said: Document, finish_reason: str | None = None) -> Document:
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}


def _usage(num_prompt: int, num_answer: int) -> Document:
    total = num_prompt + num_answer
    return {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": total}


def _fault(message: str, kind: str, param: str | None = None, code: str | None = None) -> Document:
    """An error as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(_fault(message, kind, param, code), status)


def _no_model(name: str, models: Mapping[str, AdapterServer]) -> Response:
    message = f"there is no model {name!r:.80} here; there are: {', '.join(models)}"
    return _error(404, message, "model", "model_not_found")


def _why_unsupported(field: str) -> str:
    idle = [json.dumps(value) for value in ASKS_NOTHING.get(field, [])]
    return f"is not supported, except as {' or '.join(idle)}" if idle else "is not supported"


def _answer_errors(app: FastAPI) -> None:
    """Give every error the form in which OpenAI's clients look for it."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, f"the body is no JSON: {first['ctx']['error']} (char {first['loc'][-1]})")
        param = ".".join(str(part) for part in first["loc"] if part != "body")
        fault = _why_unsupported(param) if first["type"] == "extra_forbidden" else first["msg"]
        return _error(400, f"{param or 'the body'}: {fault}", param or None)

    @app.exception_handler(OrchestratorError)
    async def failed(_: Request, error: OrchestratorError) -> Response:
        return _error(400 if isinstance(error, RequestError) else 500, str(error))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        # It is raised again behind the answer, and so logged.
        return _error(500, f"the server failed at this request ({type(error).__name__}); its log says more")

"""Error responses to invalid requests and to internal errors; no model is loaded."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from orchestrator.deploy.serving.api import ChatRequest, create_app

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
SURROGATE = "\ud83d"
"""A lone surrogate, half of a UTF-16 pair: JSON can contain it, UTF-8 cannot."""


@pytest.fixture
def client() -> TestClient:
    """A client of a server whose model fails on every question."""

    def fail(_: Any) -> list[int]:
        raise ZeroDivisionError("secret")

    server: Any = SimpleNamespace(alive=True, form=SimpleNamespace(ids=fail), plain_ids=fail)
    return TestClient(create_app({"m": server}, token=None), raise_server_exceptions=False)


def error_of(client: TestClient, path: str, body: str, status: int) -> tuple[str, str | None]:
    """Send a request, and return message and param of the error, which must have OpenAI's format."""
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")
    return error["message"], error["param"]


def content(given: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": given}]}


@pytest.mark.parametrize(
    ("path", "fields", "param", "fault"),
    [
        (CHAT, content(SURROGATE), "messages.0.content", "lone surrogate"),
        (CHAT, content([{"type": "text", "text": SURROGATE}]), "messages.0.content.0.text", "lone surrogate"),
        (CHAT, {"stop": SURROGATE}, "stop", "lone surrogate"),
        (CHAT, {"stop": ["a", SURROGATE]}, "stop.1", "lone surrogate"),
        (TEXT, {"prompt": f"a {SURROGATE}"}, "prompt", "lone surrogate"),
        (CHAT, {"stop": ["a"] * 5}, "stop", "List should have at most 4 items"),
        (CHAT, {"stop": 5}, "stop", "Input should be a string or a list"),
        (CHAT, {"stop": ["a", 5]}, "stop.1", "Input should be a valid string"),
        (CHAT, content([{"type": "image_url"}]), "messages.0.content.0.type", "Input should be 'text'"),
        (CHAT, content(None), "messages.0.content", "Input should be a string or a list"),
        (CHAT, {"n": True}, "n", "Input should be a valid integer"),
        (CHAT, {"n": 2}, "n", "Input should be less than or equal to 1"),
        (CHAT, {"max_tokens": True}, "max_tokens", "Input should be a valid integer"),
        (CHAT, {SURROGATE: 1}, None, "the body: "),
    ],
)
def test_an_invalid_field_is_named(
    client: TestClient, path: str, fields: dict[str, Any], param: str | None, fault: str
) -> None:
    body = (ASKED if path == CHAT else {"model": "m"}) | fields
    message, named = error_of(client, path, json.dumps(body), 400)
    assert named == param
    assert message.startswith(f"{param}: " if param else fault)
    assert fault in message


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("{bad", r"the body is not valid JSON: Expecting property name enclosed in double quotes (char 1)"),
        ('{"model": }', "the body is not valid JSON: Expecting value (char 10)"),
        ("", "the body: Field required"),
        ("[]", "the body: Input should be a valid dictionary"),
    ],
)
def test_an_invalid_body_is_reported_with_the_position(client: TestClient, body: str, fault: str) -> None:
    message, param = error_of(client, CHAT, body, 400)
    assert message.startswith(fault)
    assert param is None


@pytest.mark.parametrize(("path", "fields"), [(CHAT, ASKED), (TEXT, {"model": "m", "prompt": "x"})])
def test_internal_errors_have_openais_format_and_reveal_no_details(
    client: TestClient, path: str, fields: dict[str, Any]
) -> None:
    message, _ = error_of(client, path, json.dumps(fields), 500)
    assert "ZeroDivisionError" in message
    assert "secret" not in message


def test_text_and_text_parts_are_equivalent() -> None:
    parts = [{"type": "text", "text": "é"}, {"type": "text", "text": "😀"}]
    for given in ("é😀", parts):
        asked = ChatRequest.model_validate(ASKED | content(given) | {"stop": "a"})
        assert asked.messages[0].turn == {"role": "user", "content": "é😀"}
        assert asked.stops == ["a"]
    assert ChatRequest.model_validate(ASKED | {"stop": ["", "a"], "n": 1}).stops == ["a"]
    assert ChatRequest.model_validate(ASKED | {"stop": [], "n": None}).stops == []

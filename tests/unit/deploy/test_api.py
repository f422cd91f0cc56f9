"""What the server says to requests that it does not understand, and to those at which it fails; no model is loaded."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from orchestrator.deploy.serving.api import ChatRequest, create_app

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
HALF = "\ud83d"
"""Of a character of two UTF-16 units; JSON can write it, UTF-8 cannot."""


@pytest.fixture
def client() -> TestClient:
    """Of a server whose model fails at every question."""

    def fail(_: Any) -> list[int]:
        raise ZeroDivisionError("secret")

    served: Any = SimpleNamespace(alive=True, form=SimpleNamespace(ids=fail), plain_ids=fail)
    return TestClient(create_app({"m": served}, token=None), raise_server_exceptions=False)


def told(client: TestClient, path: str, body: str, status: int) -> tuple[str, str | None]:
    """Message and param of the error, which has OpenAI's form."""
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
        (CHAT, content(HALF), "messages.0.content", "half of a character"),
        (CHAT, content([{"type": "text", "text": HALF}]), "messages.0.content.0.text", "half of a character"),
        (CHAT, {"stop": HALF}, "stop", "half of a character"),
        (CHAT, {"stop": ["a", HALF]}, "stop.1", "half of a character"),
        (TEXT, {"prompt": f"a {HALF}"}, "prompt", "half of a character"),
        (CHAT, {"stop": ["a"] * 5}, "stop", "List should have at most 4 items"),
        (CHAT, {"stop": 5}, "stop", "Input should be a string or a list"),
        (CHAT, {"stop": ["a", 5]}, "stop.1", "Input should be a valid string"),
        (CHAT, content([{"type": "image_url"}]), "messages.0.content.0.type", "Input should be 'text'"),
        (CHAT, content(None), "messages.0.content", "Input should be a string or a list"),
        (CHAT, {"n": True}, "n", "Input should be a valid integer"),
        (CHAT, {"n": 2}, "n", "Input should be less than or equal to 1"),
        (CHAT, {"max_tokens": True}, "max_tokens", "Input should be a valid integer"),
        (CHAT, {HALF: 1}, None, "the body: "),
    ],
)
def test_a_field_that_is_wrong_is_named_with_its_fault(
    client: TestClient, path: str, fields: dict[str, Any], param: str | None, fault: str
) -> None:
    body = (ASKED if path == CHAT else {"model": "m"}) | fields
    message, named = told(client, path, json.dumps(body), 400)
    assert named == param
    assert message.startswith(f"{param}: " if param else fault)
    assert fault in message


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("{bad", r"the body is no JSON: Expecting property name enclosed in double quotes (char 1)"),
        ('{"model": }', "the body is no JSON: Expecting value (char 10)"),
        ("", "the body: Field required"),
        ("[]", "the body: Input should be a valid dictionary"),
    ],
)
def test_a_body_that_is_no_object_is_told_with_the_place(client: TestClient, body: str, fault: str) -> None:
    message, param = told(client, CHAT, body, 400)
    assert message.startswith(fault)
    assert param is None


@pytest.mark.parametrize(("path", "fields"), [(CHAT, ASKED), (TEXT, {"model": "m", "prompt": "x"})])
def test_any_other_fault_has_openais_form_too_and_tells_nothing_of_the_inside(
    client: TestClient, path: str, fields: dict[str, Any]
) -> None:
    message, _ = told(client, path, json.dumps(fields), 500)
    assert "ZeroDivisionError" in message
    assert "secret" not in message


def test_text_by_itself_and_in_parts_is_the_same() -> None:
    parts = [{"type": "text", "text": "é"}, {"type": "text", "text": "😀"}]
    for given in ("é😀", parts):
        asked = ChatRequest.model_validate(ASKED | content(given) | {"stop": "a"})
        assert asked.messages[0].turn == {"role": "user", "content": "é😀"}
        assert asked.stops == ["a"]
    assert ChatRequest.model_validate(ASKED | {"stop": ["", "a"], "n": 1}).stops == ["a"]
    assert ChatRequest.model_validate(ASKED | {"stop": [], "n": None}).stops == []

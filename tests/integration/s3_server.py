"""A real S3 server on the loopback interface (moto's), which can fail as stores do."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

BUCKET = "bucket"
KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"

_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>made for a test</Message></Error>"


class S3Server:
    """Serves one bucket. Its attributes and methods make it fail."""

    def __init__(self) -> None:
        self.status: int | None = None
        """Answer each request with this status instead: 503 or 403."""
        self.delay_s = 0.0
        """Answer each request this much later."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request that was answered."""
        self.before: Callable[[str, str], None] = lambda *_: None
        """Called before each request, with its method and path."""
        self._app = DomainDispatcherApplication(create_backend_app)
        self._port = 0
        self.start()

    def start(self) -> None:
        """Listen, again at the same port."""
        self._server: BaseWSGIServer = make_server("127.0.0.1", self._port, self._answer, threaded=True)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def client(self) -> Any:
        """A client of another library."""
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")

    def names(self) -> set[str]:
        """Return the names of all objects that are files."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {each["Key"] for page in pages for each in page.get("Contents", []) if not each["Key"].endswith("/")}

    def text(self, key: str) -> str:
        """Return the content of an object."""
        body: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return body.decode()

    def puts(self) -> list[str]:
        """Return the names of the objects that were written, in their order."""
        return [path.removeprefix(f"/{BUCKET}/") for method, path in self.requests if method == "PUT"]

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.before(method, path)
        time.sleep(self.delay_s)
        if self.status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = {503: "SlowDown", 403: "AccessDenied"}[self.status]
            start_response(f"{self.status} {code}", [("Content-Type", "application/xml")])
            return [_ERROR.format(code=code).encode()]
        self.requests.append((method, path))
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Start a server with one empty bucket, and have this process and its children use it."""
    from moto.s3.models import s3_backends

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    server = S3Server()
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    server.client.create_bucket(Bucket=BUCKET)
    try:
        yield server
    finally:
        server.stop()
        for backends in s3_backends.values():
            for backend in backends.values():
                backend.reset()

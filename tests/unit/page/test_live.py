"""The server of the live report: what it answers, to whom, and when the page has changed."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from growing import Growing, served

from orchestrator.cli.write_report import report
from orchestrator.errors import RequestError
from orchestrator.page.live import LiveReport, serve_report
from orchestrator.record import read_sweep, write_record
from orchestrator.record.extend import extend_sweep, save_extension


@pytest.fixture
def sweep(tmp_path: Path) -> Growing:
    growing = Growing(tmp_path, 6)
    growing.grow(2)
    return growing


@pytest.fixture
def address(sweep: Growing) -> Iterator[str]:
    with served(sweep.paths) as found:
        yield found.removeprefix("http://").removesuffix("/")


def get(
    address: str, path: str, host: str | None = None, tag: str = "", method: str = "GET"
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(address, timeout=60)
    headers = {"Host": address if host is None else host} | ({"If-None-Match": tag} if tag else {})
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers


def test_the_page_and_its_update_are_served_on_loopback_alone(address: str) -> None:
    assert address.startswith("127.0.0.1:")
    status, page, headers = get(address, "/")
    assert status == 200
    assert b"2 of 6 trials ended" in page
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"connect-src 'self'" in page
    status, body, _ = get(address, "/update")
    update = json.loads(body)
    assert set(update) == {"html", "plots", "is_over"}
    assert "0-curves" in update["plots"]
    assert not update["is_over"]


def test_an_update_has_a_body_only_if_the_records_have_changed(address: str, sweep: Growing) -> None:
    _, _, headers = get(address, "/update")
    tag = headers["ETag"]
    assert f'data-tag="{tag}"'.replace('"', "") in get(address, "/")[1].decode().replace("&#34;", "").replace('"', "")
    assert get(address, "/update", tag=tag)[:2] == (304, b"")
    sweep.grow(6)
    for _ in range(300):  # a page is not made again at once
        time.sleep(0.1)
        status, body, headers = get(address, "/update", tag=tag)
        if status == 200:
            break
    assert status == 200
    assert headers["ETag"] != tag
    assert json.loads(body)["is_over"]
    assert "6 of 6 trials ended" in json.loads(body)["html"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "[::1]:{port}", ""])
def test_a_name_that_is_not_the_servers_own_is_refused(address: str, host: str) -> None:
    """A page elsewhere that has given its own name the address of this machine gets nothing (DNS rebinding)."""
    port = address.rpartition(":")[2]
    for path in ("/", "/update"):
        status, body, _ = get(address, path, host.format(port=port))
        assert status == 403
        assert b"trial" not in body
    assert get(address, "/update", f"localhost:{port}")[0] == 200


def test_other_paths_and_methods_are_refused(address: str) -> None:
    for path in ("/sweep.json", "/../sweep.json", "/update?x=1", "/trials/"):
        assert get(address, path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert get(address, "/", method=method)[0] == 501


def test_a_damaged_sweep_is_an_answer_and_the_server_goes_on(address: str, sweep: Growing) -> None:
    trial = sweep.paths.trial(sweep.paths.trial_ids()[0]).result
    text = trial.read_text()
    trial.write_text("{")
    for _ in range(300):
        time.sleep(0.1)
        status, page, _ = get(address, "/")
        if b"could not be read" in page:
            break
    assert (status, b"could not be read" in page) == (200, True)
    trial.write_text(text)


def test_wrong_calls(sweep: Growing) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"port {port}: cannot be used"):
            serve_report([read_sweep(sweep.paths.root)], port, lambda _: None)
    folder = str(sweep.paths.root)
    with pytest.raises(RequestError, match="--live serves a page and writes no file"):
        report([folder], live=True, to=Path("x.html"))
    with pytest.raises(RequestError, match="--port is the port of --live"):
        report([folder], port=1)


def test_a_sweep_that_is_extended_has_not_ended(tmp_path: Path) -> None:
    growing = Growing(tmp_path, 3)
    growing.grow(3)
    report = LiveReport([read_sweep(growing.paths.root)])
    assert json.loads(report.newest().update)["is_over"]
    save_extension(extend_sweep(read_sweep(growing.paths.root), 5, []))
    report._made = None  # the page is not made again at once
    update = json.loads(report.newest().update)
    assert not update["is_over"]
    assert "3 of 5 trials ended" in update["html"]


def test_a_sweep_whose_finalists_are_to_run_again_has_not_ended(tmp_path: Path) -> None:
    growing = Growing(tmp_path, 3)
    growing.grow(3)
    record = read_sweep(growing.paths.root)
    search = record.info.spec.search.model_copy(update={"repeats": 2})
    spec = record.info.spec.model_copy(update={"search": search})
    write_record(growing.paths.sweep, record.info.model_copy(update={"spec": spec}))
    assert not json.loads(LiveReport([record]).newest().update)["is_over"]

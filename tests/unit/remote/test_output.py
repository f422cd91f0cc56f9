"""New sweeps in an object store: what is refused before anything starts. Against a real S3 server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3_server import SECRET, S3Server

from orchestrator.errors import RequestError, SpecError
from orchestrator.record import SweepPaths
from orchestrator.remote import store
from orchestrator.remote.holder import own_holder
from orchestrator.remote.location import driver_copy, uri_of
from orchestrator.remote.mirror import mirroring
from orchestrator.remote.output import new_sweep
from orchestrator.spec import parse_spec


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PATIENCE_S", 0.0)


def refused(document: dict[str, Any], folder: str) -> RequestError:
    with (
        pytest.raises(RequestError) as error,
        new_sweep(parse_spec(document | {"output": {"folder": folder}}), "x.yaml", "s", None),
    ):
        raise AssertionError("nothing must start")
    return error.value


def test_a_new_sweep_is_written_here_and_sent(
    document: dict[str, Any], s3: S3Server, make_sweep: Callable[..., SweepPaths], tmp_path: Path
) -> None:
    spec = parse_spec(document | {"output": {"folder": "s3://bucket/runs"}})
    with new_sweep(spec, "x.yaml", "s", None) as paths:
        assert uri_of(paths.root) == "s3://bucket/runs/s"
        assert list(paths.root.iterdir()) == [], "it must be empty until the sweep begins"
        make_sweep(tmp_path / "made", {"a": ("COMPLETE", 0.5)}).root.rename(paths.root)
        with mirroring(paths, print):
            pass
    assert "runs/s/sweep.json" in s3.names()
    error = refused(document, "s3://bucket/runs")
    assert f"{paths.root}: already exists" in error.message


def test_a_name_that_is_taken_in_the_store(document: dict[str, Any], s3: S3Server) -> None:
    s3.client.put_object(Bucket="bucket", Key="runs/s/sweep.json", Body=b"{}")
    error = refused(document, "s3://bucket/runs/")
    assert error.message == "s3://bucket/runs/s: already exists"
    assert "orchestrator resume s3://bucket/runs/s" in error.remedy
    assert not driver_copy("s3://bucket/runs/s").exists()


def test_a_bucket_that_does_not_exist(document: dict[str, Any]) -> None:
    error = refused(document, "s3://nowhere/runs")
    assert error.message.startswith("output s3://nowhere/runs/s: ")
    assert "NO_SUCH_BUCKET" in error.message
    assert error.remedy == "Give the name of a bucket that exists; buckets are not made here."
    assert not driver_copy("s3://nowhere").exists()


def test_a_missing_permission(document: dict[str, Any], s3: S3Server) -> None:
    s3.status = 403
    error = refused(document, "s3://bucket/runs")
    assert "ACCESS_DENIED" in error.message
    assert "AWS_ACCESS_KEY_ID" in error.remedy
    assert SECRET not in str(error)


def test_a_store_that_cannot_be_reached(document: dict[str, Any], s3: S3Server) -> None:
    s3.stop()
    error = refused(document, "s3://bucket/runs")
    assert "NETWORK_CONNECTION" in error.message
    assert "AWS_ENDPOINT_URL" in error.remedy
    s3.start()


def test_a_sweep_that_did_not_begin_leaves_nothing(document: dict[str, Any], s3: S3Server, cache: Path) -> None:
    def fail() -> None:
        assert s3.names() == {"runs/s/.holder.json"}
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"), new_sweep(parse_spec(document), "x", "s", "s3://bucket/runs"):
        fail()
    assert s3.names() == set()
    assert own_holder(driver_copy("s3://bucket/runs/s")) is None
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("ftp://server/runs", "the scheme ftp is not supported; use a folder, or s3://, gs://, az://"),
        ("s3://", "must be s3://BUCKET/FOLDER"),
        ("s3://bucket/runs?endpoint_override=x", "region and address of the server are read from the environment"),
        ("s3://bucket//runs", "must be s3://BUCKET/FOLDER"),
    ],
)
def test_a_wrong_uri_in_an_experiment(document: dict[str, Any], folder: str, message: str) -> None:
    with pytest.raises(SpecError, match=r"output\.folder") as error:
        parse_spec(document | {"output": {"folder": folder}})
    assert message in str(error.value)


def test_a_key_in_a_uri_is_refused_and_not_repeated(document: dict[str, Any]) -> None:
    uri = f"s3://key:{SECRET}@bucket/runs"
    with pytest.raises(SpecError, match="must not contain a key or a password") as error:
        parse_spec(document | {"output": {"folder": uri}})
    assert SECRET not in str(error.value)
    with (
        pytest.raises(RequestError, match="must not contain a key or a password") as refused,
        new_sweep(parse_spec(document), "x.yaml", "s", uri),
    ):
        pass
    assert SECRET not in str(refused.value)

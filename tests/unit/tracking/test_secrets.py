import pytest

from orchestrator import cli
from orchestrator.errors import RecordError
from orchestrator.tracking.secrets import hide_secrets, reason, traceback_of
from orchestrator.training.attempt.events import Failed, Left, Warned


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("API request to http://alice:s3cret@host/api failed", "API request to http://***@host/api failed"),
        ("url: https://alice:p@ss/w#1@host:5000/api", "url: https://***@host:5000/api"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("'postgresql://u:secret@db/x' and http://b", "'postgresql://***@db/x' and http://b"),
    ],
)
def test_user_names_and_passwords_in_addresses_are_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


def test_a_password_of_the_environment_is_hidden_in_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may split an address at a character that belongs to the password, and show the parts."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:correct%20horse@host")
    monkeypatch.setenv("WANDB_API_KEY", "a1b2c3d4e5")
    shown = hide_secrets("user alice, correct%20horse or 'correct horse', key a1b2c3d4e5")
    assert shown == "user alice, *** or '***', key ***"


def test_a_reason_is_one_short_line_without_secrets() -> None:
    assert reason(OSError("http://a:b@c\n  is gone")) == "OSError: http://***@c is gone"
    assert reason(KeyboardInterrupt()) == "KeyboardInterrupt"  # type: ignore[arg-type]
    assert len(reason(ValueError("x" * 1000))) < 320


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("HF_TOKEN", True),
        ("OPENAI_API_KEY", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_SESSION_TOKEN", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("ORCHESTRATOR_STATE_KEY", True),
        ("MLFLOW_TRACKING_PASSWORD", True),
        ("DB_PASSWORD", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("KEYBOARD", False),
        ("HF_TOKEN_PATH", False),
    ],
)
def test_a_variable_is_a_secret_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, is_secret: bool) -> None:
    monkeypatch.setenv(name, "value-0123456789")
    assert hide_secrets("a value-0123456789 b") == ("a *** b" if is_secret else "a value-0123456789 b")
    monkeypatch.setenv(name, "true")
    assert hide_secrets("it is true") == "it is true", "too short for a key, and a part of other texts"


def test_of_two_secrets_of_which_one_begins_with_the_other_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-and-more")
    assert hide_secrets("abcdefgh-and-more") == "***"


def test_a_traceback_has_no_secrets_of_its_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    try:
        try:
            raise OSError("GET http://a:b@c with hf_0123456789")
        except OSError as error:
            raise ValueError("it failed") from error
    except ValueError as error:
        shown = traceback_of(error)
    assert "OSError: GET http://***@c with ***" in shown
    assert "ValueError: it failed" in shown
    assert "hf_0123456789" not in shown


def test_texts_of_libraries_enter_no_event_with_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    text = "GET http://a:b@c with hf_0123456789"
    failed = Failed(0.0, 0.0, 0.0, error=text, remedy=text, traceback=text, cause="infrastructure")
    assert {failed.error, failed.remedy, failed.traceback} == {"GET http://***@c with ***"}
    assert Left(0.0, 0.0, 0.0, step=1, lost=text).lost == Warned(0.0, 0.0, 0.0, text).warning == failed.error
    assert Left(0.0, 0.0, 0.0, step=1, lost=None).lost is None


def test_an_error_of_a_command_is_printed_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    for error, code in ((RecordError("no hf_0123456789", "see http://a:b@c"), 2), (KeyError("hf_0123456789"), 1)):

        def fail(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(cli, "app", fail)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
        said = capsys.readouterr().err
        assert "***" in said
        assert "0123456789" not in said
        assert "a:b" not in said

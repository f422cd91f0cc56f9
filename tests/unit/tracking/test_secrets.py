import pytest

from orchestrator.tracking.secrets import hide_secrets, reason


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

"""Keep passwords and keys out of records, logs and messages."""

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

_ADDRESSES = ("MLFLOW_TRACKING_URI", "WANDB_BASE_URL", "TRACKIO_SERVER_URL")
"""Variables with an address, which may hold a name and a password."""

_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "HF_TOKEN")

_USER_INFO = re.compile(r"://[^\s'\"]*@")
"""Up to the last @ of a word: a password that is not percent-encoded may hold any other sign."""

_SHORTEST = 4
"""Characters. A shorter password may be a part of any word, and is hidden within addresses alone."""

_LONGEST_REASON = 300


def hide_secrets(text: str) -> str:
    """Replace what stands before the @ of addresses, and the passwords and keys of this process's environment."""
    text = _USER_INFO.sub("://***@", text)
    for secret in _known_secrets():
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return text


def reason(error: Exception) -> str:
    """Type and message of an error in one line, without secrets."""
    words = " ".join(str(error).split())
    told = hide_secrets(f"{type(error).__name__}: {words}" if words else type(error).__name__)
    return told if len(told) <= _LONGEST_REASON else f"{told[:_LONGEST_REASON]} ..."


def _known_secrets() -> Iterator[str]:
    for name in _SECRETS:
        yield os.environ.get(name, "")
    for name in _ADDRESSES:
        user_info, at, _ = os.environ.get(name, "").partition("://")[2].rpartition("@")
        password = user_info.partition(":")[2] if at else ""
        yield from (password, unquote(password))

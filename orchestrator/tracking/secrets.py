"""Keep passwords and keys out of records, logs and messages."""

import os
import re
import traceback
from collections.abc import Iterator
from urllib.parse import unquote

_ADDRESSES = ("MLFLOW_TRACKING_URI", "WANDB_BASE_URL", "TRACKIO_SERVER_URL")
"""Variables with an address, which may contain a user name and a password."""

_SECRETS = re.compile(r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|KEY|KEY_ID)$")
"""Matches names of variables with a secret, such as HF_TOKEN, WANDB_API_KEY and AWS_SECRET_ACCESS_KEY."""

_USER_INFO = re.compile(r"://[^\s'\"]*@")
"""Matches up to the last @ of a word, because a password that is not percent-encoded may contain other characters."""

_SHORTEST = 4
"""Length in characters. A shorter password may be part of any word, so it is hidden only in addresses."""

_SHORTEST_KEY = 8
"""Length of the value of a variable by whose name it is a secret: `true` and numbers are none."""

_LONGEST_REASON = 300


def hide_secrets(text: str) -> str:
    """Replace user names and passwords in addresses, and passwords and keys of this process's environment, by `***`."""
    text = _USER_INFO.sub("://***@", text)
    for secret in sorted(_known_secrets(), key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, "***")
    return text


def traceback_of(error: BaseException) -> str:
    """Return an error's traceback with those of its causes, without secrets."""
    return hide_secrets("".join(traceback.format_exception(error)))


def reason(error: Exception) -> str:
    """Return an error's type and message in one line, without secrets."""
    message = " ".join(str(error).split())
    line = hide_secrets(f"{type(error).__name__}: {message}" if message else type(error).__name__)
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."


def _known_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if _SECRETS.search(name) and len(value) >= _SHORTEST_KEY:
            yield value
    for name in _ADDRESSES:
        user_info, at, _ = os.environ.get(name, "").partition("://")[2].rpartition("@")
        password = user_info.partition(":")[2] if at else ""
        yield from (each for each in (password, unquote(password)) if len(each) >= _SHORTEST)

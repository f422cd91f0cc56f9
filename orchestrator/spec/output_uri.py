"""URIs of object stores, which may stand where a folder of sweeps is asked for."""

import re
from urllib.parse import urlsplit

SCHEMES = ("s3", "gs", "az")
"""Amazon S3 and servers that speak its protocol, Google Cloud Storage, Azure Blob Storage."""

_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._=+-]*)*")


def is_uri(folder: str) -> bool:
    """Return whether a text is a URI rather than a folder."""
    return "://" in folder


def uri_fault(uri: str) -> str | None:
    """Return what is wrong with the URI of an output; None if it can be one."""
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES:
        return f"the scheme {scheme} is not supported; use a folder, or {', '.join(f'{each}://' for each in SCHEMES)}"
    if "@" in rest:
        # Records name the output, so a key in it would be written into each of them.
        return "must not contain a key or a password; give it in the environment, as the library of the store expects"
    if urlsplit(uri).query or not _FORM.fullmatch(rest.rstrip("/")):
        return (
            f"must be {scheme}://BUCKET/FOLDER with letters, digits, '.', '_', '=', '+' and '-'; region and address of "
            "the server are read from the environment"
        )
    return None

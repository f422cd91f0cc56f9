"""How attempts and workers are lost, and why, in words."""

from ray.exceptions import OutOfMemoryError, RayError

_DIED = "its process died: killed (the system ran out of memory, or SIGKILL), or crashed"

_CAUSES = {
    "low on memory": "the memory of its node ran short, and Ray ended it",
    "memory threshold": "the memory of its node ran short, and Ray ended it",
    "preempted": "its node was preempted",
    "node has died": "its node died",
    "node is dead": "its node died",
    "node was terminated": "its node died",
    "ray.kill": "it was ended by the driver",
    "ray stop": _DIED,
    "End of file": _DIED,
    "is unavailable": _DIED,
    "creation task": "it failed while it started",
}
"""A part of Ray's text about a death (2.60) -> the cause in words. The first that fits is taken."""


class AttemptLost(Exception):
    """An attempt at a trial has ended without a result; another attempt may continue from the last checkpoint."""

    def __init__(self, message: str, counts: bool = False) -> None:
        """
        Args:
            message: the cause.
            counts: whether an error of the training was the cause, which counts as a failure of the trial.
        """
        super().__init__(message, counts)
        self.message = message
        self.counts = counts

    def __str__(self) -> str:
        return self.message


class OutOfMemory(AttemptLost):
    """An attempt has run out of GPU memory. The next one takes less."""


def why_lost(error: RayError | str) -> str:
    """Return why a process was lost, by Ray's error or by the text in its table of actors."""
    text = str(error).strip()
    if isinstance(error, OutOfMemoryError):
        text = f"low on memory: {text}"
    found = next((cause for part, cause in _CAUSES.items() if part in text), None)
    return found or (text.splitlines()[0] if text else _DIED)

"""Helpers for the wording of messages."""


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with the noun that it counts, such as `1 trial` or `2 trials`.

    Args:
        number: the number.
        one: the noun in the singular.
        many: the plural; default `one` with an "s" appended.
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def say_gib(gib: float) -> str:
    """Return a size in words, such as `17.3 GiB`, or `9.5 MiB` below a tenth of a GiB."""
    return f"{gib:.3g} GiB" if gib >= 0.1 else f"{gib * 1024:.3g} MiB"

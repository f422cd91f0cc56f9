"""Helpers for the wording of messages."""


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with the noun that it counts, such as `1 trial` or `2 trials`.

    Args:
        number: the number.
        one: the noun in the singular.
        many: the plural; default `one` with an "s" appended.
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"

"""Words of messages."""


def counted(number: int, one: str, many: str = "") -> str:
    """A number and what is counted: `1 trial`, `2 trials`; `many` where the plural is not `one` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"

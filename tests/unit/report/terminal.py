"""A real terminal for tests: a program runs in a pseudoterminal, and pyte draws what a person would see."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence

import pyte

_PAUSE_S = 0.02
SIZES = [(80, 24), (100, 30), (160, 50)]


def screens(
    arguments: Sequence[str],
    columns: int,
    lines: int,
    term: str = "xterm-256color",
    code: int = 0,
    look: Callable[[list[str]], None] = lambda _: None,
) -> list[list[str]]:
    """Run Python with these arguments in a terminal; return the screen whenever the output pauses.

    A frame may come in several pieces, which follow each other at once.

    Args:
        arguments: arguments of Python.
        columns: width of the terminal.
        lines: height of the terminal.
        term: the variable TERM.
        code: exit code that the program must have.
        look: called with each screen, while the program runs.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment | {"TERM": term}
    )
    os.close(theirs)
    screen = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(screen)
    seen = []
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the program has closed its end
            break
        if not piece:
            break
        stream.feed(piece)
        if select.select([ours], [], [], _PAUSE_S)[0]:
            continue
        seen.append([line.rstrip() for line in screen.display])
        look(seen[-1])
    os.close(ours)
    assert process.wait() == code, "\n".join(seen[-1] if seen else [])
    return seen

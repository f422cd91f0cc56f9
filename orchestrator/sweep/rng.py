"""Random numbers of one's own, for libraries that draw from the process's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class OwnRng:
    """A state of Python's and of numpy's generator, which is pickled with whoever owns it."""

    def __init__(self, seed: int) -> None:
        """Begin at `seed`."""
        self._python: Any = random.Random(seed).getstate()
        self._numpy: Any = np.random.RandomState(seed).get_state()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """What is drawn in the block goes on from here; the process's own state is as before."""
        outer = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            self._python, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(outer[0])
            np.random.set_state(outer[1])

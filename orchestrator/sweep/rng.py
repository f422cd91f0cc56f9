"""Separate random state for libraries that draw from the global generators of Python and NumPy."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class IsolatedRng:
    """A state of Python's and NumPy's global generators. It is pickled with its owner."""

    def __init__(self, seed: int) -> None:
        """Seed both generators."""
        self._python: Any = random.Random(seed).getstate()
        self._numpy: Any = np.random.RandomState(seed).get_state()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Draw from this state inside the block, and restore the global state after it."""
        outer = random.getstate(), np.random.get_state()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            self._python, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(outer[0])
            np.random.set_state(outer[1])

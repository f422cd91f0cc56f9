"""The points that a search has drawn, so that no trial repeats another."""

import random
from collections.abc import Callable

from orchestrator.spec.search import SearchSection
from orchestrator.sweep.search.space import Point

_NUM_DRAWS = 20
"""Draws of the searcher before a point is chosen for it: a model may return to its best point every time."""
_NUM_RANDOM_DRAWS = 1000


class DrawnPoints:
    """Remembers every point of a search and finds new ones. It is pickled with the searcher, for a resume."""

    def __init__(self, search: SearchSection) -> None:
        """Start with no point; random choices are seeded by `search.seed`."""
        self._search = search
        self._seen: set[str] = set()
        self._random = random.Random(search.seed)

    def draw_new(
        self, draw: Callable[[], Point | None], discard: Callable[[], None], enqueue: Callable[[Point], None]
    ) -> Point | None:
        """Draw until a point is new. Once the space has no new point, repeat one.

        Args:
            draw: returns the searcher's next point, or None where it has none at the moment.
            discard: returns the last drawn point to the searcher.
            enqueue: makes a given point the next one that the searcher draws.
        """
        for _ in range(_NUM_DRAWS):
            point = draw()
            if point is None or self._add(point):
                return point
            discard()
        if (other := self._find_new()) is not None:
            enqueue(other)
        point = draw()
        if point is not None:
            self._add(point)
        return point

    def see(self, point: Point) -> None:
        """Remember a point that somebody has asked for, so that the search does not draw it too."""
        self._add(point)

    def _add(self, point: Point) -> bool:
        """Remember a point, and return whether it is new."""
        key = repr(sorted(point.items()))
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new

    def _find_new(self) -> Point | None:
        """Find a point that was not drawn yet: a random one, or the first one left where most points were drawn."""
        for _ in range(_NUM_RANDOM_DRAWS):
            drawn = {path: axis.draw(self._random) for path, axis in self._search.space.items()}
            point = self._search.decode(drawn)
            if repr(sorted(point.items())) not in self._seen:
                return point
        points = self._search.points() if self._search.num_points < float("inf") else ()
        return next((point for point in points if repr(sorted(point.items())) not in self._seen), None)

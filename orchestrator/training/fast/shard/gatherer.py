"""A thread that gathers layer after layer, in step with the threads of the other processes of the group.

Before each pass the processes tell each other what they want: nothing, a forward pass, or a forward and a backward.
Then all gather the layers that the longest of these needs; a process that wants less joins without using them. So no
process waits for what another's trials do between passes, and none can be in another collective than the others.

    position   0  1 ... L-1  L ... 2L-2        forward, then backward
    layer      0  1 ... L-1  L-2 ... 0         the last layer is still there when the backward begins
    buffer     0  1  0  1 ...                  one is filled while the other is used

On a GPU the gathers run on a stream of their own, outside CUDA graphs: events order them against the passes.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.training.fast.shard.group import Group
from orchestrator.training.fast.shard.place import GroupLost

IDLE, FORWARD, TRAIN = range(3)
"""What a process tells the others."""

IDLE_S = 0.02
"""Time between two questions while no process has a pass."""

PATIENCE_S = 0.05
"""How long a process that had a pass keeps the others waiting for its next one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A rank's piece of one decoder layer."""

    data: torch.Tensor
    """(n,) uint8."""
    num_bytes: int
    """Bytes of the whole layer."""


class Gatherer:
    """Gathers layers into two buffers, for passes of this process and of the others."""

    def __init__(self, group: Group, shards: Sequence[Shard], on_lost: Callable[[], None]) -> None:
        """Allocate the buffers, and start the thread.

        Args:
            group: the processes.
            shards: this rank's piece of each decoder layer.
            on_lost: called in the thread when a process of the group has ended: nothing can be gathered any more.
        """
        self.shards = shards
        """May be replaced by equal ones, between passes."""
        self._group = group
        self._on_lost = on_lost
        device, size = shards[0].data.device, max(shard.num_bytes for shard in shards)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        """Position in a pass, modulo 2 -> where its layer lies."""
        self.current: tuple[int, int] | None = None
        """(layer, buffer) that the pass of this process may read now."""
        self._condition = threading.Condition()
        self._waiting: _Pass | None = None
        self._error: GroupLost | None = None
        self._was_busy = self._others_busy = False
        self._last_uses: list[Any] = [None, None]
        """Buffer -> CUDA event after which it is no longer read."""
        self._on_gpu = device.type == "cuda"
        self._thread = threading.Thread(target=self._run, name="gather", daemon=True)
        self._thread.start()

    @contextmanager
    def passing(self, trains: bool) -> Iterator[Callable[[int], None]]:
        """Make a pass over the layers.

        Args:
            trains: whether a backward follows the forward.

        Yields:
            A function to call with each position, in order, before its layer is used. The one before is then free.

        Raises:
            GroupLost: another process has ended.
        """
        made = _Pass(TRAIN if trains else FORWARD)
        with self._condition:
            self._require_group()
            self._waiting = made
            self._condition.notify_all()
        try:
            yield lambda position: self._visit(made, position)
        finally:
            self._leave(made)

    # The thread that makes passes

    def _visit(self, made: "_Pass", position: int) -> None:
        self._release(made, position - 1)
        with self._condition:
            self._condition.wait_for(lambda: made.num_gathered > position or self._error is not None)
            self._require_group()
            layer, event = made.layers[position]
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        self.current = layer, position % 2

    def _leave(self, made: "_Pass") -> None:
        self.current, event = None, self._event()
        with self._condition:
            self._last_uses = [event, event]  # a pass that an error has ended may have sent work for both
            made.has_ended = True
            self._condition.notify_all()

    def _release(self, made: "_Pass", position: int) -> None:
        """Let the buffer of a position be filled again, once the device has done what was sent to it."""
        if position < made.num_released:
            return
        event = self._event()
        with self._condition:
            self._last_uses[position % 2] = event
            made.num_released = position + 1
            self._condition.notify_all()

    def _event(self) -> Any:
        """Return a CUDA event after what has been sent to the current stream; None on a CPU."""
        if not self._on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _require_group(self) -> None:
        if self._error is not None:
            raise self._error

    # The thread that gathers

    def _run(self) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if self._on_gpu else nullcontext()
        try:
            with stream:
                while True:
                    self._round()
        except RuntimeError as error:  # what torch raises when another process is gone
            self._lose(f"another process of the group is gone: {str(error).strip().splitlines()[0]}")
        except Exception as error:  # without this thread, each pass would wait for ever
            self._lose(f"layers cannot be gathered: {type(error).__name__}: {error}")
            raise

    def _round(self) -> None:
        """Agree with the other processes on a pass, and make it."""
        made = self._next_pass()
        wishes = self._group.exchange(IDLE if made is None else made.kind)
        self._was_busy, self._others_busy = made is not None, max(wishes) > IDLE
        if self._others_busy:
            self._gather_pass(max(wishes), made)

    def _next_pass(self) -> "_Pass | None":
        """Return the pass that this process waits for; None if there is none for a while."""
        wait_s = PATIENCE_S if self._was_busy else 0.0 if self._others_busy else IDLE_S
        with self._condition:
            self._condition.wait_for(lambda: self._waiting is not None, wait_s)
            made, self._waiting = self._waiting, None
            return made

    def _gather_pass(self, kind: int, made: "_Pass | None") -> None:
        """Gather all layers of a pass of this kind.

        Args:
            kind: the longest pass that any process wants.
            made: the pass of this process, if it has one.
        """
        shards = self.shards
        for position, layer in enumerate(_layers(kind, len(shards))):
            number = position % 2
            if made is not None:
                self._wait_for_buffer(made, position)
            if self._last_uses[number] is not None:
                torch.cuda.current_stream().wait_event(self._last_uses[number])
            shard = shards[layer]
            self._group.gather(self.buffers[number][: shard.num_bytes], shard.data)
            if made is not None:
                self._publish(made, layer)
        if made is not None:
            with self._condition:
                self._condition.wait_for(lambda: made.has_ended)

    def _wait_for_buffer(self, made: "_Pass", position: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: made.num_released > position - 2 or made.has_ended)

    def _publish(self, made: "_Pass", layer: int) -> None:
        event = self._event()
        with self._condition:
            made.layers.append((layer, event))
            self._condition.notify_all()

    def _lose(self, reason: str) -> None:
        """Refuse passes from now on. `on_lost` comes first: if it ends the process, no trial fails by this."""
        _log.warning("resources.strategy shard: %s", reason)
        self._on_lost()
        with self._condition:
            self._error = GroupLost(f"resources.strategy shard: {reason}; the log of that process says why")
            self._condition.notify_all()


class _Pass:
    """A pass of this process over the layers. The gatherer's condition guards it."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.layers: list[tuple[int, Any]] = []
        """Position -> number of the layer, and the CUDA event after which it has been gathered."""
        self.num_released = 0
        """Positions whose buffers may be filled again."""
        self.has_ended = False

    @property
    def num_gathered(self) -> int:
        return len(self.layers)


def _layers(kind: int, count: int) -> list[int]:
    """Return the layers of a pass in the order in which they are gathered."""
    forward = list(range(count))
    return forward if kind == FORWARD else forward + forward[-2::-1]

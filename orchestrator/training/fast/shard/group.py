"""The processes that hold a base in pieces: how they find each other, and their collective operations.

torch's default process group stays unset: transformers, accelerate and trl would take it for data parallelism.
"""

import os
import socket
import time
from datetime import timedelta

import torch
from torch import distributed

from orchestrator.record.files import write_atomic
from orchestrator.training.fast.shard.place import GroupLost, Place

LOOPBACK, LOOPBACK_INTERFACE = "127.0.0.1", "lo"
"""All processes of a group run on one machine, and nothing listens to others."""

JOIN_S = 900.0
"""Longest time to wait for the other processes of the group."""

COLLECTIVE_S = 1800.0
"""Longest time of one collective operation: the first one waits until the slowest process has loaded its base."""

_RETRY_S = 0.2


class Group:
    """Collective operations of the processes of a group. One thread may use it."""

    def __init__(self, place: Place, on_gpu: bool) -> None:
        """Wait until all processes of the group have joined.

        Args:
            place: of this process.
            on_gpu: whether weights lie on this process's GPU, and are gathered by NCCL. Otherwise gloo gathers them.

        Raises:
            GroupLost: not all have come within `JOIN_S`, or one has ended since it came.
        """
        self.rank, self.num_ranks = place.rank, place.num_ranks
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        """Where this process's pieces lie."""
        timeout = timedelta(seconds=COLLECTIVE_S)
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK_INTERFACE
        try:
            self._store = _store(place)
            store, size = distributed.PrefixStore("host", self._store), place.num_ranks
            self._host = distributed.ProcessGroupGloo(store, place.rank, size, timeout)
            self._device = self._host
            if on_gpu:
                store = distributed.PrefixStore("device", self._store)
                self._device = distributed.ProcessGroupNCCL(store, place.rank, size, timeout)
        except RuntimeError as error:  # torch's errors of a connection or a wait are among these
            raise GroupLost(
                f"resources.strategy shard: process {place.rank} of {place.num_ranks} cannot join the others: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        if place.rank == 0:  # all have come: the port is needed no more
            place.port_file.unlink(missing_ok=True)

    def exchange(self, value: int) -> list[int]:
        """Tell all processes a number, and return those of all, by rank."""
        every = [torch.zeros(1, dtype=torch.int32) for _ in range(self.num_ranks)]
        self._host.allgather([every], [torch.tensor([value], dtype=torch.int32)]).wait()
        return [int(each) for each in every]

    def gather(self, whole: torch.Tensor, shard: torch.Tensor) -> None:
        """Fill `whole` (num_ranks * n,) from the `shard` (n,) of each rank. On a GPU the current stream waits, no more.

        Args:
            whole: uint8.
            shard: uint8, this rank's piece.
        """
        self._device._allgather_base(whole, shard).wait()


def _store(place: Place) -> distributed.TCPStore:
    """Return the store by which the group's processes find each other; it listens on the loopback interface only."""
    size, deadline = place.num_ranks, time.monotonic() + JOIN_S
    if place.rank == 0:
        listener = socket.create_server((LOOPBACK, 0))
        port = listener.getsockname()[1]
        write_atomic(place.port_file, str(port))
        return distributed.TCPStore(
            LOOPBACK,
            port,
            size,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_S),
            master_listen_fd=listener.detach(),
        )
    while time.monotonic() < deadline:
        try:
            port = int(place.port_file.read_text())
            with socket.create_connection((LOOPBACK, port), timeout=1):  # the file may be from before a restart
                pass
            return distributed.TCPStore(
                LOOPBACK, port, size, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=JOIN_S)
            )
        except (OSError, ValueError, distributed.DistError):
            time.sleep(_RETRY_S)
    raise GroupLost(
        f"resources.strategy shard: process {place.rank} of {size} has not found the first one within {JOIN_S:g} s; "
        "see the logs of the workers for why it could not start"
    )

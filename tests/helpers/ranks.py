"""Real processes that play the ranks of one machine, over gloo."""

from __future__ import annotations

import io
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2
TIMEOUT_S = 60  # of a collective: long enough for a busy machine
PATIENCE_S = 300  # with a start and with an answer, which has to come even from a hung collective
START_METHOD = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"


def serve(rank: int, size: int, port: int, timeout_s: float, connection: Connection) -> None:
    """What a rank does: run the jobs that come, send back the result or the error."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    patience, timeout = timedelta(seconds=PATIENCE_S), timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    connection.send_bytes(packed(None))
    while (message := connection.recv_bytes()) != b"":
        job, arguments = torch.load(io.BytesIO(message), weights_only=False)
        try:
            result = job(rank, *arguments)
        except Exception as error:
            result = Failure(type(error).__name__, str(error))
        connection.send_bytes(packed(result))
    dist.destroy_process_group()


class Failure(NamedTuple):
    error: str
    message: str


def packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


class Ranks:
    """Processes that run one job after another, all ranks the same one.

    Where one does not answer, all are replaced, so that later jobs find no answer of an earlier
    one; the new processes run `prepare` first, as the first ones did.
    """

    def __init__(
        self,
        size: int = WORLD_SIZE,
        timeout_s: float = TIMEOUT_S,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        self.size, self.timeout_s, self.prepare = size, timeout_s, prepare
        self.start()

    def start(self) -> None:
        port = free_port()
        context = mp.get_context(START_METHOD)
        if START_METHOD == "forkserver":
            context.set_forkserver_preload(["torch", "pytest"])  # loaded once for all ranks
        self.connections: list[Connection] = []
        self.processes: list[mp.Process] = []
        for rank in range(self.size):
            own, other = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, self.size, port, self.timeout_s, other), daemon=True
            )
            process.start()
            self.connections.append(own)
            self.processes.append(process)
        self.answers()
        if self.prepare is not None:
            assert self.run(self.prepare) == [None] * self.size

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The result of each rank; `job` is called with the rank first."""
        if not self.processes:
            self.start()
        try:
            for connection in self.connections:
                connection.send_bytes(packed((job, arguments)))
        except OSError:
            self.kill()
            raise
        return self.answers()

    def answers(self) -> list[Any]:
        results = []
        try:
            for rank, connection in enumerate(self.connections):
                if not connection.poll(PATIENCE_S):
                    raise TimeoutError(f"rank {rank} does not answer")
                results.append(torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False))
        except (EOFError, OSError):
            self.kill()
            raise
        return results

    def close(self) -> None:
        for connection in self.connections:
            connection.send_bytes(b"")
        for process in self.processes:
            process.join(TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []

"""Questions between the processes of a job beside MPI, which are answered even while MPI and the engine are stuck.

Every process has a thread that sleeps until it is asked or asks: it costs nothing until then. A question is one short
connection by TCP, because the kernel of a host answers for a process that cannot: one that is stopped still accepts
connections, one that is gone refuses them, and a dead host does neither.

A connection: the listener sends a nonce; the other sends what it asks, and is told the answer. Both are JSON after
their length and an HMAC with the job's secret, which rank 0 draws at init() and MPI carries; so only processes of the
job can ask, and nobody else can answer. Listeners are bound to the interface that the other nodes reach, or to the
loopback.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import enum
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import addresses

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Channel", "Process", "Silence"]

_NONCE = 16
_HEAD = struct.Struct("!I32s")  # length, HMAC
_LONGEST_QUESTION, _LONGEST_ANSWER = 1 << 16, 1 << 22  # bytes
_AT_A_TIME = 128  # questions that this process asks
_MOST_CONNECTIONS = 256  # of others to this process
_BACKLOG = 1024
_PATIENCE_S = 5.0  # of a listener, with whoever has connected
_END_S = 1.0


class Silence(enum.Enum):
    """Why there is no answer."""

    NO_PROCESS = "its process is gone"
    NO_HOST = "its host does not answer"
    NO_ANSWER = "its process does not answer"


@dataclass(frozen=True)
class Process:
    """Where a rank is."""

    host: str
    pid: int
    address: str
    port: int
    namespace: str = ""
    """Of process numbers: ranks that share it see each other's processes."""


class Channel:
    """One for each process; made by `open_channel`."""

    def __init__(self, rank: int, processes: list[Process], secret: bytes, listener: socket.socket) -> None:
        self.rank = rank
        self.processes = processes
        self.answers: dict[str, Callable[[Any], Any]] = {}
        """What this rank answers, by what it is asked: short functions of JSON, called by the channel's thread."""
        self._secret = secret
        self._listener = listener
        self._connections = 0
        self._closing = threading.Lock()  # guards what follows
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="collective out of band", daemon=True)
        self._thread.start()

    def ask(self, ranks: Iterable[int], what: str, about: object = None, seconds: float = 1.0) -> Mapping[int, Any]:
        """Ask ranks, all at once.

        Args:
            ranks: whom; this rank may be among them.
            what: which of their `answers`.
            about: JSON, passed to it.
            seconds: for each of connecting and answering.

        Returns:
            By rank its answer, or a Silence. An answer that failed there is a Silence, too, and so are all once the
            channel is closed.
        """
        asked = list(ranks)
        nobody = dict.fromkeys(asked, Silence.NO_ANSWER)
        with self._closing:
            if self._is_closed:
                return nobody
            answers = asyncio.run_coroutine_threadsafe(self._ask_all(asked, what, about, seconds), self._loop)
        try:
            return answers.result()
        except concurrent.futures.CancelledError:
            return nobody

    def close(self) -> None:
        """Answer nobody any more, and end what is being asked."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_END_S)

    def close_in_child(self) -> None:
        """After a fork: a child must not keep the port open when this process is gone."""
        self._listener.close()

    def _run(self) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._listener, backlog=_BACKLOG))
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(self._end_tasks())
        self._loop.close()

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections > _MOST_CONNECTIONS:
                return
            nonce = secrets.token_bytes(_NONCE)
            writer.write(nonce)
            reading = self._read(reader, b"question" + nonce, _LONGEST_QUESTION)
            question = await asyncio.wait_for(reading, _PATIENCE_S)
            answers = self.answers.get(question["what"])
            if answers is None:  # not yet, or not on this rank
                return
            answer = answers(question["about"])
            self._write(writer, b"answer" + nonce + question["id"].encode(), answer)
            await asyncio.wait_for(writer.drain(), _PATIENCE_S)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, _ForgedError):
            pass  # not of this job, or gone: whoever it was gets no answer
        finally:
            self._connections -= 1
            writer.close()

    async def _ask_all(self, ranks: list[int], what: str, about: object, seconds: float) -> dict[int, Any]:
        room = asyncio.Semaphore(_AT_A_TIME)

        async def ask_one(rank: int) -> object:
            async with room:
                return await self._ask(self.processes[rank], what, about, seconds)

        return dict(zip(ranks, await asyncio.gather(*map(ask_one, ranks)), strict=True))

    async def _ask(self, process: Process, what: str, about: object, seconds: float) -> object:
        try:
            connecting = asyncio.open_connection(process.address, process.port)
            reader, writer = await asyncio.wait_for(connecting, seconds)
        except ConnectionRefusedError:
            return Silence.NO_PROCESS
        except (OSError, asyncio.TimeoutError):
            return Silence.NO_HOST
        try:
            return await asyncio.wait_for(self._exchange(reader, writer, what, about), seconds)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, _ForgedError):
            return Silence.NO_ANSWER
        finally:
            writer.close()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: str, about: object
    ) -> object:
        nonce = await reader.readexactly(_NONCE)
        own = secrets.token_hex(_NONCE)
        self._write(writer, b"question" + nonce, {"id": own, "what": what, "about": about})
        return await self._read(reader, b"answer" + nonce + own.encode(), _LONGEST_ANSWER)

    def _sign(self, context: bytes, body: bytes) -> bytes:
        return hmac.digest(self._secret, hashlib.sha256(context).digest() + body, "sha256")

    def _write(self, writer: asyncio.StreamWriter, context: bytes, what: object) -> None:
        body = json.dumps(what).encode()
        writer.write(_HEAD.pack(len(body), self._sign(context, body)) + body)

    async def _read(self, reader: asyncio.StreamReader, context: bytes, longest: int) -> Any:
        length, signed = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        if length > longest:
            raise _ForgedError
        body = await reader.readexactly(length)
        if not hmac.compare_digest(signed, self._sign(context, body)):
            raise _ForgedError
        return json.loads(body)


class _ForgedError(Exception):
    """Somebody who does not know the secret."""


def open_channel(comm: MPI.Intracomm) -> Channel | None:
    """Connect the ranks of `comm`; collective. None, on all of them, if not all nodes reach an address of rank 0's."""
    address = _own_address(comm)
    with contextlib.ExitStack() as unless_used:
        listener = unless_used.enter_context(socket.socket())
        port = 0
        if address is not None:
            with contextlib.suppress(OSError):  # told to all by the port
                listener.bind((address, 0))
                listener.listen(_BACKLOG)
                listener.setblocking(False)
                port = listener.getsockname()[1]
        mine = (socket.gethostname(), os.getpid(), address or "", port, _process_numbers())
        secret = comm.bcast(secrets.token_bytes(32))
        everyone = comm.allgather(mine)
        if any(not process[3] for process in everyone):
            return None
        unless_used.pop_all()
    return Channel(comm.Get_rank(), [Process(*process) for process in everyone], secret, listener)


def _process_numbers() -> str:
    """The namespace that this process's number is of."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"of process {os.getpid()}"  # not known to be anybody else's


def _own_address(comm: MPI.Intracomm) -> str | None:
    """Where the other nodes reach this one; one rank of each node finds out."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    firsts = comm.Split(0 if node.Get_rank() == 0 else MPI.UNDEFINED)
    address: str | None = None
    if isinstance(firsts, MPI.Intracomm) and firsts:
        found = addresses.find(firsts, local_size=1)
        address = None if found is None else found.own
        firsts.Free()
    of_node: str | None = node.bcast(address)
    node.Free()
    return of_node

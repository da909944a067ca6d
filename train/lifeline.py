"""When a rank dies, the others know it at once and end, instead of waiting in a collective for half an hour.

Every rank holds a TCP connection to rank 0. The system closes it with the process, however that dies; who leaves in order
says so first, and who fails says why. Rank 0 passes on what it sees. (A machine that loses its power closes nothing: that
is for the watchdog.)
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import sys
import threading
import time

from sieve.train.distributed import Place, from_rank_0

_LEAVES, _FAILS = b"L", b"F"
_GRACE = 5.0  # seconds for the main thread to end by itself, with its own words
_HEAD = struct.Struct("<cII")  # kind, rank, bytes of text
_MAX_TEXT = 2000


class Lifeline:
    """A context around the training of one rank of several; nothing when there is only one. All ranks together."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.death: str | None = None
        self._dead = threading.Event()
        self._closing = False
        self._peers: dict[int, socket.socket] = {}

    def __enter__(self) -> Lifeline:
        if self.place.world_size == 1:
            return self
        server = socket.create_server(("", 0), backlog=self.place.world_size) if self.place.rank == 0 else None
        port = from_rank_0(None if server is None else server.getsockname()[1])
        if server is not None:
            server.settimeout(60)
            with server:
                while len(self._peers) < self.place.world_size - 1:
                    peer, _ = server.accept()
                    peer.settimeout(10)
                    self._peers[_HEAD.unpack(_exactly(peer, _HEAD.size))[1]] = peer
        else:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60)
            peer.sendall(_HEAD.pack(_LEAVES, self.place.rank, 0))
            self._peers[0] = peer
        for peer in self._peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing = True
        self._tell(_HEAD.pack(_LEAVES, self.place.rank, 0))

    def fail(self, why: str) -> None:
        """Tell the others that this rank ends because of an error."""
        text = why.encode()[:_MAX_TEXT]
        self._closing = True
        self._tell(_HEAD.pack(_FAILS, self.place.rank, len(text)) + text)

    def blame(self, seconds: float = 3.0) -> str | None:
        """Whose death an error of this rank follows from, if another's is known or becomes known within `seconds`."""
        if self.place.world_size > 1:
            self._dead.wait(seconds)
        return self.death

    def _tell(self, message: bytes) -> None:
        for peer in self._peers.values():
            try:
                peer.sendall(message)
            except OSError:
                pass  # it is gone itself

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        kind, rank, size = _HEAD.unpack(_exactly(key.fileobj, _HEAD.size))
                        text = _exactly(key.fileobj, size).decode(errors="replace")
                    except OSError:
                        kind, rank, text = _FAILS, key.data, "it was killed, or crashed without a word"
                    selector.unregister(key.fileobj)
                    if kind == _FAILS:
                        self._end(rank, text)

    def _end(self, rank: int, text: str) -> None:
        if self._closing or self.death is not None:
            return
        self.death = f"rank {rank} is gone: {text}"
        if self.place.rank == 0:
            told = text.encode()[:_MAX_TEXT]
            self._tell(_HEAD.pack(_FAILS, rank, len(told)) + told)
        self._dead.set()
        time.sleep(_GRACE)
        if not self._closing:
            print(f"sieve train: {self.death}; rank {self.place.rank} ends, too", file=sys.stderr, flush=True)
            os._exit(1)


def _exactly(peer: socket.socket, size: int) -> bytes:
    """The next `size` bytes; ConnectionError (an OSError) when the other end is closed before."""
    data = b""
    while len(data) < size:
        more = peer.recv(size - len(data))
        if not more:
            raise ConnectionError("closed")
        data += more
    return data

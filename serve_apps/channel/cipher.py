"""TLS of a replica's end, apart from its socket: the engine's thread sends while the event loop reads."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading

_READ_BYTES = 1 << 16


class Cipher:
    """What a connection carries, and what is said over it. Without a context both are the same.

    May be used from any thread. What is encrypted must be sent in the order of the calls. OSError where the other end
    is not one that the context trusts, or what comes is not TLS.
    """

    def __init__(self, context: ssl.SSLContext | None, host: str) -> None:
        """`host`: which was dialled; the other end's certificate must name it."""
        self._lock = threading.Lock()
        self._received, self._unsent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = None if context is None else context.wrap_bio(self._received, self._unsent, server_hostname=host)

    async def greet(self, sock: socket.socket) -> None:
        """The handshake, before anything else is sent."""
        if self._tls is None:
            return
        loop = asyncio.get_running_loop()
        while True:
            is_done = _shaken(self._tls)
            if unsent := self._unsent.read():
                await loop.sock_sendall(sock, unsent)
            if is_done:
                return
            data = await loop.sock_recv(sock, _READ_BYTES)
            if not data:
                raise ConnectionError("the other end has ended the TLS handshake")
            self._received.write(data)

    def encrypt(self, said: bytes) -> bytes:
        if self._tls is None:
            return said
        with self._lock:
            left = memoryview(said)
            while left:
                left = left[self._tls.write(left) :]
            return self._unsent.read()

    def decrypt(self, carried: bytes) -> bytes:
        """What is complete of what has come."""
        if self._tls is None:
            return carried
        said = bytearray()
        with self._lock:
            self._received.write(carried)
            try:
                while part := self._tls.read(_READ_BYTES):
                    said += part
            except ssl.SSLWantReadError:
                pass
        return bytes(said)


def _shaken(tls: ssl.SSLObject) -> bool:
    """Whether the handshake is complete; otherwise more must be received."""
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True

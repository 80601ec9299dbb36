"""Where a gateway takes tokens: a socket of its node, and a TCP port for replicas on other nodes."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field

TOKEN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Address:
    """Of one gateway process.

    node   Ray's id of the gateway's node
    name   of its socket in Linux' abstract namespace, which leaves no file behind
    token  64 ASCII characters that begin every connection
    """

    node: str
    name: str
    host: str
    port: int
    token: str = field(repr=False)


async def dial(address: Address, node: str) -> socket.socket:
    """A non-blocking connection to the gateway from a process on `node`. Raises OSError."""
    local = address.node == node
    family = socket.AF_UNIX if local else (socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        target = abstract(address.name) if local else (address.host, address.port)
        await asyncio.get_running_loop().sock_connect(sock, target)
        if not local:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # tokens are sent at once
    except BaseException:
        sock.close()
        raise
    return sock


def abstract(name: str) -> str:
    """The address of a socket in the abstract namespace."""
    return f"\0{name}"

"""Unix sockets by which the processes of one node and one user talk to each other."""

from __future__ import annotations

import socket
import struct

_CREDENTIALS = struct.Struct("3i")  # of a process: its id, user and group


def abstract(name: str) -> str:
    """Return the address of a socket in Linux' abstract namespace, which leaves no file behind."""
    return f"\0{name}"


def peer_user(sock: socket.socket) -> int:
    """Return the user of the process at the other end of a Unix socket."""
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)

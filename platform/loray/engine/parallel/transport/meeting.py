"""Where the ranks of an engine find each other: a store in rank 0's process, which listens at one address alone.

The names in it begin with what only the ranks that know the engine's secret can compute. Whoever else reaches the port
can list names, and so keep an engine from starting; but a rank is sent nothing before it has shown that it knows the
secret (`communicator`). Nothing in the store is a program, or is made into objects.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

SECRET_BYTES = _NONCE_BYTES = hashlib.sha256().digest_size


def joined(rank: int) -> str:
    """The key that is set when this rank has started."""
    return f"joined-{rank}"


def open_meeting(host: str, secret: bytes) -> tuple[Store, int]:
    """Rank 0's store, and the port of `host` at which the others find it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.bind((host, 0))
        port: int = listening.getsockname()[1]
        descriptor = listening.detach()  # the store closes it
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
    return PrefixStore(_prefix(secret), store), port


def meeting(host: str, port: int, secret: bytes) -> Store:
    """Rank 0's store, for another rank."""
    return PrefixStore(_prefix(secret), TCPStore(host, port, is_master=False))


def new_nonce() -> bytes:
    return secrets.token_bytes(_NONCE_BYTES)


def proof(secret: bytes, rank: int, nonce: bytes) -> bytes:
    """That this rank knows the secret, for the one that sent `nonce`."""
    return hmac.digest(secret, b"rank %d " % rank + nonce, hashlib.sha256)


def _prefix(secret: bytes) -> str:
    return hmac.digest(secret, b"meeting", hashlib.sha256).hex()

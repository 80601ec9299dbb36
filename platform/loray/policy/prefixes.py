"""Names of prompts' prefixes, for caches that cannot compare tokens: of blocks in host memory, and of other processes.

A name is the digest of all that keys and values of a block depend on: the adapter, the salt of its caller, and the
tokens up to the block's end. So blocks of equal names have equal contents, and the names of a prompt's blocks are a
chain: each is made of the one before it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

TOLD_BLOCKS = 4  # of a chain one in so many is told to routers
_TOLD_DIGITS = 16  # of its name, as of an adapter's
_BYTES = 24


def chained(before: str, part: Sequence[int] | str | None) -> str:
    """Name what comes after `before`: a block of tokens, or an adapter or salt (None: the base)."""
    if part is None or isinstance(part, str):
        return _named(before, b"owner", repr(part).encode())
    return _named(before, b"tokens", array("q", part).tobytes())


def _started(digest: str | None, salt: str) -> str:
    """Name the empty prefix of an adapter, or of the base."""
    name = chained("", digest)
    return chained(name, salt) if salt else name


def activated(before: str, digest: str, offset: int) -> str:
    """Name the prefix `before` of the base, where an adapter is active from token `offset` of the next block on."""
    return _named(before, b"activation", f"{digest}@{offset}".encode())  # no caller can give a salt of the same name


def _named(before: str, kind: bytes, content: bytes) -> str:
    return blake2b(content, key=before.encode(), person=kind, digest_size=_BYTES).hexdigest()


def block_names(
    digest: str | None,
    tokens: Sequence[int],
    block_tokens: int,
    *,
    salt: str = "",
    active_from: int = 0,
    before: tuple[int, str] = (0, ""),
) -> Iterator[str]:
    """Name the full blocks of a prompt.

    active_from  the token of the prompt from which the adapter is active; those before it are the base's
    before       the number of blocks before `tokens`, and the last one's name
    """
    num_before, name = before
    if not num_before:
        name = _started(None if active_from else digest, salt)
    for i in range(len(tokens) // block_tokens):
        if active_from and digest is not None and num_before + i == active_from // block_tokens:
            name = activated(name, digest, active_from % block_tokens)
        name = chained(name, tokens[i * block_tokens : (i + 1) * block_tokens])
        yield name


def told(name: str) -> str:
    """Return what routers are told of a name. If two collide, a request goes to the wrong replica, which serves it."""
    return name[:_TOLD_DIGITS]


def told_names(
    digest: str | None, tokens: Sequence[int], block_tokens: int, *, salt: str = "", active_from: int = 0
) -> tuple[str, ...]:
    """Return what a replica that has computed the prompt tells of it: every TOLD_BLOCKS blocks a name."""
    names = block_names(digest, tokens, block_tokens, salt=salt, active_from=active_from)
    return tuple(told(name) for i, name in enumerate(names, 1) if i % TOLD_BLOCKS == 0)

"""Conversions of adapters in processes of their own.

The API loads no torch and must go on answering, so a conversion is a bounded process: as many at once as there are
processors and memory for, one for a tenant, with a deadline, and ended when its client leaves. Nothing is kept: a
merged checkpoint is as large as its base.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from fastapi import Request
from starlette.requests import ClientDisconnect

from loray.bases.registry import base_with
from loray.errors import DeadlineExceeded, Overloaded, RateLimited
from loray.machine import memory_left, num_cores
from loray.priority import compute_in_background
from loray.publishing.convert import MAX_MEMORY_BYTES, Form, command_of, environment_of, raise_failure
from loray.settings import Settings
from loray.spec import AdapterManifest, AdapterRef, format_size

DEADLINE_S = 900.0
_LOOK_S = 0.2  # between two looks whether the client is still there
_RETRY_S = 60.0
_HEADERS_BYTES = 1 << 20
LEAST_BYTES = 1 << 30  # of memory, with which a process can do anything
MEMORY_SHARE = 0.8  # of what is left when a conversion begins


class Conversions:
    """Makes the conversions of one server. Safe from several threads and event loops."""

    def __init__(self, settings: Settings, left: Callable[[], int] = memory_left) -> None:
        """`left`: the bytes of memory that processes may take now."""
        self._settings, self._left = settings, left
        self._lock = Lock()
        self._tenants: set[str] = set()
        self._held: list[int] = []  # bytes that each process may take

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Hold a tenant's place until the result is sent, so that it has one on this disk. Raises RateLimited."""
        with self._lock:
            if tenant in self._tenants:
                raise RateLimited(
                    "another conversion of this tenant is being made or sent; ask again when it has ended", _RETRY_S
                )
            self._tenants.add(tenant)
        try:
            yield
        finally:
            with self._lock:
                self._tenants.remove(tenant)

    def num_bytes(self, form: Form, manifest: AdapterManifest) -> int:
        """Bound the bytes that are made. Raises BaseMismatch where this machine does not have the base."""
        base = base_with(self._settings.home, manifest.base_fingerprint, manifest.base)
        if form == "gguf":
            return 4 * manifest.nbytes + _HEADERS_BYTES
        return sum(path.stat().st_size for path in base.path.iterdir()) + _HEADERS_BYTES

    async def make(self, form: Form, ref: AdapterRef, target: Path, *, client: Request) -> None:
        """Write the adapter in this form to the new `target`.

        Raises RateLimited where others have the memory or the processors, Overloaded where there is too little memory
        without them, DeadlineExceeded, and as `publishing.convert` does; ClientDisconnect where the client has left.
        """
        with self._memory() as max_bytes:
            output = await self._run(command_of(form, ref, target, max_bytes), client)
        raise_failure(*output)

    @contextmanager
    def _memory(self) -> Iterator[int]:
        """Reserve the bytes that one process may take, for the block."""
        with self._lock:
            left = int(MEMORY_SHARE * self._left())
            max_bytes = min(MAX_MEMORY_BYTES, left - sum(self._held))
            if self._held and (max_bytes < LEAST_BYTES or len(self._held) >= num_cores()):
                raise RateLimited(
                    f"{len(self._held)} conversions are being made, beside which there is no memory or no processor "
                    "for another one; ask again in a minute",
                    _RETRY_S,
                )
            if max_bytes < LEAST_BYTES:
                raise Overloaded(
                    f"a conversion takes {format_size(LEAST_BYTES)} of memory at least, and this server has "
                    f"{format_size(max(0, left))} for it: give it more, or use `loray adapters convert` elsewhere",
                    _RETRY_S,
                )
            self._held.append(max_bytes)
        try:
            yield max_bytes
        finally:
            with self._lock:
                self._held.remove(max_bytes)

    async def _run(self, command: list[str], client: Request) -> tuple[int, bytes]:
        """Return (exit code, output)."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # it ends with this process
            stdout=subprocess.PIPE,
            env=environment_of(self._settings),
            process_group=0,  # in this session, in which engines compute in the background too
        )
        with suppress(ProcessLookupError):
            compute_in_background(process.pid)  # what it imports, too: engines compute in the background themselves
        ended = asyncio.get_running_loop().run_in_executor(None, _output_of, process)
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not ended.done():
                    if await client.is_disconnected():
                        raise ClientDisconnect
                    await asyncio.wait({ended}, timeout=_LOOK_S)
        except TimeoutError:
            raise DeadlineExceeded(f"the conversion took longer than {DEADLINE_S:.0f} s and was ended") from None
        finally:
            if not ended.done():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await asyncio.shield(ended)
        return process.returncode, ended.result()


def _output_of(process: subprocess.Popen[bytes]) -> bytes:
    """Return what the process has written by its end."""
    with process:  # closes its pipes
        assert process.stdout is not None
        output = process.stdout.read()
        process.wait()
        return output

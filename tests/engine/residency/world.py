"""A residency whose store and pool a test controls."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from loray.engine.memory.adapter_manager import AdapterManager
from loray.engine.memory.partial import PartialLoad
from loray.engine.metrics import AdapterUsageLog
from loray.spec import AdapterRef


@dataclass(frozen=True)
class Pair:
    digest: str
    nbytes: int


@dataclass(frozen=True)
class Packed:
    nbytes: int
    partial: PartialLoad | None = None
    pair: Pair | None = None

    @property
    def host_bytes(self) -> int:
        return self.nbytes


class World:
    """A store whose loads end when a test says so, and a pool of `slots` adapters."""

    def __init__(self, *, slots: int = 2, host_bytes: int = 1000) -> None:
        self.loads: dict[str, Future[Packed]] = {}
        self.num_loads = 0
        self.slots = slots
        self.placed: list[str] = []
        self.slow: set[str] = set()  # whose rows are on their way to the pool
        self.now = 0.0
        self.adapter_manager: AdapterManager[Packed, str] = AdapterManager(
            host_bytes=host_bytes,
            load=self.load,
            place=self.place,
            remove=self.placed.remove,
            copy_is_done=lambda name: name not in self.slow,
            usage=AdapterUsageLog(now=lambda: 1000 + self.now),
            clock=lambda: self.now,
        )

    def load(self, ref: AdapterRef) -> Future[Packed]:
        self.num_loads += 1
        self.loads[ref.name] = Future()
        return self.loads[ref.name]

    def place(self, ref: AdapterRef, packed: Packed) -> str | None:
        if len(self.placed) == self.slots:
            return None
        self.placed.append(ref.name)
        return ref.name

    def finish(self, name: str, nbytes: int = 100) -> None:
        self.loads[name].set_result(Packed(nbytes))
        self.adapter_manager.poll()

    def bring(self, name: str) -> AdapterRef:
        r = ref(name)
        self.adapter_manager.add_waiter(r)
        self.adapter_manager.poll()
        self.finish(name)
        assert self.adapter_manager.acquire(r) is not None
        self.adapter_manager.remove_waiter(r)
        return r


def ref(name: str, nbytes: int = 100) -> AdapterRef:
    digest = name.encode().hex().rjust(64, "0")
    return AdapterRef(
        digest=digest, name=name, version=1, method="lora", base_fingerprint="0" * 64, context_length=10, nbytes=nbytes
    )

"""Answers that went on at another replica, as all gateways have counted them."""

from __future__ import annotations

import httpx

_NAME = "loray_resumes_total{"
_TIMEOUT_S = 20.0


class Resumes:
    """A gateway's count ends with it, and one that does not answer in time is left out of an exposition. So the largest
    count of each gateway is kept.
    """

    def __init__(self) -> None:
        self._most: dict[str, float] = {}

    def read(self, exposition: str) -> None:
        """In Prometheus' text format. A series is one gateway's: its name is in the labels."""
        for line in exposition.splitlines():
            if line.startswith(_NAME):
                series, _, count = line.rpartition(" ")
                self._most[series] = max(float(count), self._most.get(series, 0.0))

    @property
    def total(self) -> int:
        return int(sum(self._most.values()))

    async def ask(self, client: httpx.AsyncClient, urls: list[str]) -> int:
        """How many there have been by now, of the applications at `urls`."""
        for url in urls:
            try:
                self.read((await client.get(f"{url}/metrics", timeout=_TIMEOUT_S)).text)
            except httpx.HTTPError:
                continue
        return self.total

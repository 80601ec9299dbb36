"""Answers that went on at another replica, as all gateways have counted them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import httpx

_NAME = "loray_resumes_total{"
_TIMEOUT_S = 20.0


class Resumes:
    """A gateway's count ends with it, and one that does not answer in time is left out of an exposition. So the largest
    count of each gateway is kept.
    """

    def __init__(self, urls: Sequence[str], key: str) -> None:
        """`urls`: of the applications."""
        self._urls, self._headers = urls, {"Authorization": f"Bearer {key}"}
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

    async def ask(self) -> int:
        """How many there have been by now. One application that does not answer counts as before."""
        async with httpx.AsyncClient(headers=self._headers, timeout=_TIMEOUT_S) as client:
            for url in self._urls:
                with suppress(httpx.TransportError):
                    response = await client.get(f"{url}/metrics")
                    if not response.is_server_error:
                        self.read(response.raise_for_status().text)
        return self.total

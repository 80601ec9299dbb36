"""Training jobs of the catalog's API: on this machine's Ray cluster if it runs. `loray serve` itself starts none."""

from __future__ import annotations

from jobs.submission.home import HomeJobServer
from loray.errors import ClusterError


class LocalJobServer(HomeJobServer):
    """Sends nothing to other machines, which have another store and catalog."""

    def _address(self) -> str:
        if self._settings.is_remote:
            raise ClusterError(
                f"`loray serve` sends no jobs to another machine ({self._settings.address}); use `loray train`, or the "
                "API of `loray up`"
            )
        return super()._address()

"""What the console's pages need of the application that serves them."""

from __future__ import annotations

from typing import Protocol

from jobs.submission.tracker import JobTracker
from loray.catalog import Catalog
from loray.settings import Settings
from loray.spec import Principal
from loray.store import AdapterStore
from serve_apps.console.gateway import Gateway


class Backend(Protocol):
    """The catalog API's services. What exists for a caller, `catalog_of` and `jobs_of` decide, as for the REST API."""

    gateway: Gateway

    @property
    def settings(self) -> Settings: ...

    @property
    def store(self) -> AdapterStore: ...

    def catalog_of(self, principal: Principal) -> Catalog: ...

    def jobs_of(self, principal: Principal) -> JobTracker: ...

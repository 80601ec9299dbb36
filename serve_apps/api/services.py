"""Services behind the routes, opened on first use: the catalog, the store, Ray's job server, and engines' replicas."""

from __future__ import annotations

import time
from threading import Lock
from typing import Annotated, TypeVar
from urllib.parse import urlencode

from fastapi import Depends, Path, Query, Request, Response

from jobs.submission.server import RayJobServer
from jobs.submission.tracker import JobTracker
from loray.bases.registry import list_bases
from loray.catalog import Catalog
from loray.errors import CatalogError, ConflictError, LorayError
from loray.local.serving import ServingAddress
from loray.schemas.resources import Page
from loray.scratch import Scratch
from loray.service import CatalogService
from loray.settings import Settings
from loray.spec import Alias, Name, Principal, ServeSpec, TenantName
from loray.store import AdapterStore, open_store
from loray.telemetry import get_logger
from serve_apps.api.conversions import Conversions
from serve_apps.auth import RateLimits
from serve_apps.console import GatewayClient, Placements, Streams
from serve_apps.places import MostPlaces, Places

T = TypeVar("T")

_log = get_logger(__name__)

ACTOR = "api"
LONG = MostPlaces(total=4, of_tenant=2, wait_s=10.0)  # publications
SENDING = MostPlaces(total=16, of_tenant=2, wait_s=10.0)  # files
DOWNLOADS = MostPlaces(total=16, of_tenant=2, wait_s=10.0)
FOLLOWERS = MostPlaces(total=64, of_tenant=16, of_key=4)  # of logs
_RETRY_S = 1.0  # between two attempts to open the catalog, as in the header Retry-After

NamePath = Annotated[Name, Path(description="Name of an adapter")]
TenantQuery = Annotated[TenantName | None, Query(description="whose adapter it is, where it is not the own tenant's")]
AliasPath = Annotated[Alias, Path(description="`prod`, `canary`, …")]
Limit = Annotated[int, Query(ge=1, le=1000, description="items of a page")]


async def _adapter_name(name: NamePath, tenant: TenantQuery = None) -> str:
    return name if tenant is None else f"{tenant}/{name}"


AdapterName = Annotated[str, Depends(_adapter_name)]


class Services:
    """The services of one application, each opened on first use: the server starts without its database, and says 503.

    long, sending, downloads, followers  how many publications are made at once, files received, downloads made and
                                         sent, and logs followed
    rates    how often keys and tenants ask
    scratch  the bytes of all these on this machine's disk
    """

    def __init__(
        self, settings: Settings, jobs: RayJobServer, placements: Placements, gateway: GatewayClient | None = None
    ) -> None:
        """`gateway`: the deployment's, which pages ask; the default listens at the usual port of this machine."""
        self.placements = placements
        self.conversions, self.streams = Conversions(settings), Streams()
        self.long = Places("publications", LONG)
        self.sending = Places("files", SENDING)
        self.downloads = Places("downloads", DOWNLOADS)
        self.scratch = Scratch(settings.scratch_bytes)
        self.rates = RateLimits()
        self.followers = Places("followers of logs", FOLLOWERS)
        self.gateway = gateway or GatewayClient(ServingAddress("127.0.0.1", ServeSpec().port).url)
        self.settings, self._job_server = settings, jobs
        self._catalog_lock, self._store_lock = Lock(), Lock()
        self._catalog: Catalog | None = None
        self._failure, self._failed_at = "", float("-inf")
        self._store: AdapterStore | None = None

    @property
    def catalog(self) -> Catalog:
        """The whole catalog, for what belongs to no tenant. Raises CatalogError.

        Concurrent requests share one attempt to open it, which may take long.
        """
        with self._catalog_lock:
            if self._catalog is None:
                if time.monotonic() - self._failed_at < _RETRY_S:
                    raise CatalogError(self._failure)
                try:
                    catalog = Catalog.of(self.settings, ACTOR)
                    _reserve_bases(catalog, self.settings)
                    self._catalog = catalog
                except LorayError as e:
                    self._failure = str(e) if isinstance(e, CatalogError) else f"the catalog cannot be opened: {e}"
                    self._failed_at = time.monotonic()
                    raise CatalogError(self._failure) from e
            return self._catalog

    def catalog_of(self, principal: Principal) -> Catalog:
        """View the catalog as this caller sees it, who is logged as the API without a key. Raises CatalogError."""
        if principal.key_id is None:
            principal = principal.model_copy(update={"actor": ACTOR})
        return self.catalog.view(principal)

    def service_of(self, principal: Principal) -> CatalogService:
        """What this caller may do with the catalog, which is opened when it is first needed."""
        return CatalogService(self.settings, lambda: self.catalog_of(principal), lambda: self.store, self.scratch)

    def jobs_of(self, principal: Principal) -> JobTracker:
        """Track the jobs of this caller's tenant."""
        return JobTracker(lambda: self.catalog_of(principal), self._job_server, self.settings)

    def watch_jobs(self) -> None:
        """Compare the jobs of all tenants with Ray's; see `JobTracker.watch`."""
        JobTracker(lambda: self.catalog, self._job_server, self.settings).watch()

    @property
    def store(self) -> AdapterStore:
        with self._store_lock:
            if self._store is None:
                self._store = AdapterStore(open_store(self.settings.store))
            return self._store

    def close(self) -> None:
        for places in (self.long, self.sending, self.downloads, self.followers):
            places.close()
        if self._catalog is not None:
            self._catalog.close()


async def _services(request: Request) -> Services:  # FastAPI would call a plain function in a thread
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(_services)]


def _reserve_bases(catalog: Catalog, settings: Settings) -> None:
    """Keep the names of this machine's bases, so that no adapter takes one of a base that has published nothing."""
    try:
        bases = list_bases(settings.home)
    except LorayError as e:
        _log.warning("the bases of this machine cannot be read: %s", e)
        return
    for base in bases:
        try:
            catalog.bases.add(base.name, base.fingerprint, base.of)
        except ConflictError as e:
            _log.warning("%s", e)


def linked(page: Page[T], request: Request, response: Response) -> Page[T]:
    """Give the page a Link header to the next one if there is one."""
    if page.next is not None:
        others = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
        query = urlencode([*others, ("cursor", page.next)])
        response.headers["Link"] = f'<{request.url.path}?{query}>; rel="next"'
    return page

"""The gateway's ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from jobs.submission.server import RayJobServer
from loray import __version__
from loray.bases.registry import get_bases
from loray.catalog.snapshot_file import SnapshotFile
from loray.settings import Settings
from loray.spec import FleetSpec
from serve_apps import auth
from serve_apps.accounting.access_log import log_access
from serve_apps.accounting.accounts import AdmitRequests, UsageMeter
from serve_apps.accounting.quotas import QuotaExchange
from serve_apps.auth import AllowOrigins, Authenticate, Authenticator, Permissions, open_auth
from serve_apps.gateway import errors
from serve_apps.gateway.anthropic import AnthropicForm
from serve_apps.gateway.bases import Gateways, OpenEngines, ServedBase
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.files.batches import batch_routes
from serve_apps.gateway.files.lines import BatchLines
from serve_apps.gateway.files.routes import file_routes
from serve_apps.gateway.files.storage import FileStorage
from serve_apps.gateway.files.upload import MAX_FORM_BYTES
from serve_apps.gateway.fine_tuning.jobs import FineTuning
from serve_apps.gateway.fine_tuning.routes import fine_tuning_routes
from serve_apps.gateway.gateway import Gateway
from serve_apps.gateway.metrics import CountRequests
from serve_apps.gateway.rollouts import Rollouts
from serve_apps.gateway.routes import create_routes, describe
from serve_apps.http import BodyLimit, EchoRequestId, path_of
from serve_apps.tracing import TraceRequests, Tracing

CATALOG_SNAPSHOT = "catalog-snapshot.jsonl"  # in the home folder
_ADVICE = "send fewer or shorter prompts in one request, or serve with a larger max_body_bytes"


def create_app(
    gateway: Gateway,
    access: Authenticator,
    tracing: Tracing | None = None,
    origins: frozenset[str] = frozenset(),
    files: FileStorage | None = None,
    tuning: FineTuning | None = None,
) -> FastAPI:
    """Create the ASGI application, which follows the catalog while it runs. `origins`: as for AllowOrigins. `files`
    None: it has no routes of files; nor of fine-tuning, where `tuning` is None.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await access.start()
        await gateway.directory.follower.start()
        async with gateway.canaries.running(), gateway.accounts.running(), AsyncExitStack() as running:
            for base in gateway.bases.values():
                await running.enter_async_context(base.engines.running(gateway.turns.tokens_are_late))
            yield
        for base in gateway.bases.values():
            base.prompts.close()
        await gateway.directory.follower.stop()
        await access.stop()
        if tuning is not None:
            tuning.close()
        if files is not None:
            files.close()

    own = create_routes(gateway)
    app = FastAPI(
        title="loray",
        version=__version__,
        lifespan=lifespan,
        routes=[*own, *([] if files is None else stored_routes(files, own, tuning)), *auth.router.routes],
        docs_url=None,
        redoc_url=None,
    )
    permissions = Permissions(app.routes)
    app.state.gateway = gateway
    app.state.lines = BatchLines(app, gateway, access)
    app.state.rollouts = Rollouts(gateway, access)
    gateway.counted.keys_age_s = lambda: access.age_s
    errors.install(app)

    def refused(error: Exception) -> Response:
        return errors.response_of(errors.failure_of(error))

    def max_bytes(scope: Scope) -> int:
        return MAX_FORM_BYTES if path_of(scope) == "/v1/files" else gateway.max_body_bytes()

    app.add_middleware(BodyLimit, max_bytes=max_bytes, advice=_ADVICE)
    paths = permissions.paths("infer")  # which generate or tokenise
    app.add_middleware(AdmitRequests, accounts=gateway.accounts, turns=gateway.turns, paths=paths, refused=refused)
    if tracing is not None:
        app.add_middleware(TraceRequests, tracing=tracing)
    app.add_middleware(Authenticate, access=access, permissions=permissions, refused=refused)
    app.add_middleware(EchoRequestId)
    app.add_middleware(AnthropicForm)
    if origins:
        app.add_middleware(AllowOrigins, access=access, origins=origins)
    app.add_middleware(CountRequests, metrics=gateway.counted)

    describe(app, permissions)
    return app


def stored_routes(files: FileStorage, own: Sequence[BaseRoute], tuning: FineTuning | None) -> list[BaseRoute]:
    """Make the routes of what tenants keep here, and train from it. `own`: those of the gateway, which batches may
    ask.
    """
    paths = {route.path for route in own if isinstance(route, Route)}
    of_jobs = [] if tuning is None else fine_tuning_routes(files, tuning)
    return [*file_routes(files), *batch_routes(files, paths), *of_jobs]


def open_gateway(
    fleet: FleetSpec,
    settings: Settings,
    engines: OpenEngines,
    gateways: Gateways | None = None,
    exchange: QuotaExchange | None = None,
    access: Authenticator | None = None,
    tracing: Tracing | None = None,
    jobs: RayJobServer | None = None,
) -> FastAPI:
    """Open a gateway of a deployment: its bases on this machine, and the catalog that `settings` names.

    `engines` opens those of a base. `exchange` None: no other gateway counts the same limits. `access` None: keys that
    this application alone reads. `app.state.gateway` is the Gateway.
    """
    bases = get_bases(settings.home, fleet.names)
    kept = SnapshotFile(settings.home / CATALOG_SNAPSHOT, settings.catalog)
    access = access or open_auth(settings, fleet.host)
    directory = ModelResolver(bases, access.follower, kept)
    accounts = UsageMeter(settings, 1 if exchange is None else fleet.num_gateways, exchange, access.is_limited)
    served = [ServedBase.open(s, base, engines(s)) for s, base in zip(fleet.bases, bases, strict=True)]
    refuses = settings.refuses_unknown_fields
    gateway = Gateway(served, directory, gateways, accounts, refuses_unknown_fields=refuses)
    files = FileStorage(settings) if settings.files else None
    sampled = None if gateways is None else fleet.names  # jobs of `loray serve` have a cluster of their own
    tuning = None if jobs is None or files is None else FineTuning(jobs, settings, sampled)
    app = create_app(gateway, access, tracing, frozenset(settings.origins), files, tuning)
    return log_access(app, settings.access_log)

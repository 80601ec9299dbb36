"""The Serve application `tinker`: the routes of Tinker's protocol, for its SDK from 0.25.0 on.

Routes are below `/tinker/api/v1`. Errors are JSON with `detail`. A status is chosen by what the SDK does about it: it
tries 408, 409, 429 and 5xx again for minutes, so what the caller has to change is 400, whatever it is elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from ray import serve
from ray.serve import Application
from starlette.types import Scope

from loray.errors import LorayError, NotFoundError, RequestError
from loray.schemas.tinker import requests, results
from loray.schemas.tinker.paths import CheckpointPath, RequestId
from loray.schemas.tinker.proto import reads_zstd
from loray.schemas.tinker.requests import TinkerRequest
from loray.settings import Settings
from loray.spec import Frozen
from loray.telemetry import get_logger
from serve_apps.auth import Authenticate, Authenticator, Permissions, may, principal_of
from serve_apps.deployment import ON_THE_HEAD
from serve_apps.http import BodyLimit, EchoRequestId, WithoutRequestId, install_error_handlers, new_request_id, read
from serve_apps.tinker.front import Front, open_front
from serve_apps.tinker.sessions import refuse_old

_log = get_logger(__name__)

FRONT = "front"
MAX_BODY_BYTES, MAX_PASS_BYTES = 4 << 20, 16 << 20
KEY_START = "tml-"  # before a key: the SDK takes none without
_PASS = "/api/v1/forward_backward"
_ADVICE = "send fewer datums in one request"
_MAX_ONGOING = 4096  # requests, most of which wait for a result
_JSON = "application/json"
_USERS = frozenset({409, 412, 422, 500, 501, 507})  # statuses of LorayErrors that trying again does not mend
_NOT_DONE = {
    "retrieve_futures": "results are asked for one by one, with retrieve_future",
    "copy_weights": "weights are not copied: a path is read by all keys of its tenant",
    "save_weights_external": "`loray adapters download` gets a published version",
    "create_custom_loss": "custom losses run in the client, with forward_backward_custom",
    "sessions/search": "GET sessions lists them",
    "auth/token": "API keys are sent as they are",
}
B = TypeVar("B", bound=TinkerRequest)
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0)]


def create_app(front: Front, access: Authenticator) -> FastAPI:
    """Create the ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await access.start()
        watching = asyncio.create_task(front.watch())
        yield
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await front.close()
        await access.stop()

    app = FastAPI(title="loray tinker", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.router.routes += _routes(front).routes
    permissions = Permissions(app.routes)
    install_error_handlers(app, failed=failed, invalid=_invalid, refused=_refused)
    app.add_middleware(BodyLimit, max_bytes=_max_body_bytes, advice=_ADVICE)
    app.add_middleware(Authenticate, access=access, permissions=permissions, refused=failed, key_start=KEY_START)
    app.add_middleware(EchoRequestId, make=new_request_id)
    return app


def _routes(front: Front) -> APIRouter:
    router = APIRouter(prefix="/api/v1")
    sessions, training, sampling, checkpoints = front.sessions, front.training, front.sampling, front.checkpoints

    @router.get("/healthz")
    @may("open")
    async def health() -> Response:
        return _answer({"status": "ok"})

    @router.get("/get_server_capabilities")
    @may("session")
    async def capabilities() -> Response:
        models = [
            {"model_name": name.name, "max_context_length": name.context_length, "trainable": True, "sampleable": True}
            for name in await front.names.all()
        ]
        return _answer({"supported_models": models})

    @router.post("/client/config")
    @may("session")
    async def client_config(request: Request) -> Response:
        refuse_old((await _body(request, requests.ClientConfigRequest)).sdk_version)
        return _answer(results.client_config(compressed=reads_zstd()))

    @router.post("/client/dynamic_config")
    @may("session")
    async def client_dynamic_config(request: Request) -> Response:
        return _answer(results.client_dynamic_config())

    @router.post("/telemetry")
    @may("session")
    async def telemetry() -> Response:
        return _answer({"status": "accepted"})  # and not read

    # -- sessions -----------------------------------------------------------------------------------------------------

    @router.post("/create_session")
    @may("session")
    async def create_session(request: Request) -> Response:
        return _answer(
            await sessions.create(principal_of(request), await _body(request, requests.CreateSessionRequest))
        )

    @router.post("/session_heartbeat")
    @may("session")
    async def heartbeat(request: Request) -> Response:
        asked = await _body(request, requests.SessionRequest)
        await sessions.heartbeat(principal_of(request), asked.session_id)
        return _answer({"type": "session_heartbeat"})

    @router.get("/sessions")
    @may("session")
    async def list_sessions(request: Request, limit: Limit = 20, offset: Offset = 0) -> Response:
        rows, _ = await front.records.ask(
            principal_of(request), lambda catalog: catalog.tinker.sessions(limit=limit, offset=offset)
        )
        return _answer({"sessions": [row.id for row in rows]})

    @router.get("/sessions/{session_id}")
    @may("session")
    async def get_session(request: Request, session_id: str) -> Response:
        return _answer(await front.session(principal_of(request), session_id))

    @router.post("/sessions/{session_id}/finish")
    @may("session")
    async def finish_session(request: Request, session_id: str) -> Response:
        asked = await _body(request, requests.FinishSessionRequest)
        await front.end_session(principal_of(request), session_id, asked.reason.type)
        return _answer({})

    # -- training -----------------------------------------------------------------------------------------------------

    @router.post("/create_model")
    @may("train")
    async def create_model(request: Request) -> Response:
        asked = await _body(request, requests.CreateModelRequest)
        return _answer(await front.begin_model(principal_of(request), asked))

    @router.post("/load_weights")
    @may("train")
    async def load_weights(request: Request) -> Response:
        asked = await _body(request, requests.LoadWeightsRequest)
        load = front.begin_model if asked.model_id is None else training.load
        return _answer(await load(principal_of(request), asked))

    @router.post("/get_info")
    @may("train")
    async def get_info(request: Request) -> Response:
        asked = await _body(request, requests.ModelRequest)
        return _answer(await training.info(principal_of(request), asked.model_id))

    @router.post("/forward_backward")
    @may("train")
    async def forward_backward(request: Request) -> Response:
        encoding = request.headers.get("content-encoding", "identity")
        asked = await read(request, lambda raw: requests.read_forward_backward(raw, encoding))
        return _answer(await training.forward_backward(principal_of(request), asked))

    @router.post("/optim_step")
    @may("train")
    async def optim_step(request: Request) -> Response:
        asked = await _body(request, requests.OptimStepRequest)
        return _answer(await training.optim_step(principal_of(request), asked))

    @router.post("/save_weights")
    @may("train")
    async def save_weights(request: Request) -> Response:
        asked = await _body(request, requests.SaveWeightsRequest)
        return _answer(await checkpoints.save(principal_of(request), asked))

    @router.post("/save_weights_for_sampler")
    @may("train")
    async def save_weights_for_sampler(request: Request) -> Response:
        asked = await _body(request, requests.SaveWeightsForSamplerRequest)
        return _answer(await checkpoints.save_for_sampler(principal_of(request), asked))

    # -- sampling -----------------------------------------------------------------------------------------------------

    @router.post("/create_sampling_session")
    @may("infer")
    async def create_sampling_session(request: Request) -> Response:
        asked = await _body(request, requests.CreateSamplingSessionRequest)
        return _answer(await sampling.create(principal_of(request), asked))

    @router.post("/join_sampling_session")
    @may("infer")
    async def join_sampling_session(request: Request) -> Response:
        asked = await _body(request, requests.SamplerRequest)
        return _answer(await sampling.join(principal_of(request), asked.sampling_session_id))

    @router.get("/samplers/{sampler_id}")
    @may("infer")
    async def get_sampler(request: Request, sampler_id: str) -> Response:
        return _answer(await sampling.info(principal_of(request), sampler_id))

    @router.post("/asample")
    @may("infer")
    async def asample(request: Request) -> Response:
        asked = await _body(request, requests.SampleRequest)
        return _answer(await sampling.sample(principal_of(request), asked))

    # -- results ------------------------------------------------------------------------------------------------------

    @router.post("/retrieve_future")
    @may("session")
    async def retrieve_future(request: Request) -> Response:
        """Wait for a result, 408 where it does not come in time. No thread waits."""
        asked = await _body(request, requests.RequestIdRequest)
        try:
            found = await front.result(principal_of(request), RequestId.parse(asked.request_id))
        except LorayError as e:
            if status_of(e) in (403, 404, 410, 503):
                raise
            return _answer(results.failed(e))
        if found is None:
            state, reason = front.waits_for(asked.request_id, principal_of(request))
            return _answer(results.try_again(asked.request_id, state, reason), 408)
        return _answer(found)

    @router.post("/cancel_future")
    @may("infer")
    async def cancel_future(request: Request) -> Response:
        """Stop a sample. What is in a model's queue stays there."""
        request_id = RequestId.parse((await _body(request, requests.RequestIdRequest)).request_id)
        if not request_id.is_training:
            front.futures.cancel(str(request_id), principal_of(request).tenant)
        return _answer({})

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @router.post("/weights_info")
    @may("train")
    async def weights_info(request: Request) -> Response:
        asked = await _body(request, requests.WeightsInfoRequest)
        return _answer(await checkpoints.weights_info(principal_of(request), asked.tinker_path))

    @router.get("/training_runs")
    @may("train")
    async def list_training_runs(request: Request, limit: Limit = 20, offset: Offset = 0) -> Response:
        return _answer(await checkpoints.runs(principal_of(request), limit, offset))

    @router.get("/training_runs/{model_id}")
    @may("train")
    async def get_training_run(request: Request, model_id: str) -> Response:
        return _answer(await checkpoints.run(principal_of(request), model_id))

    @router.get("/training_runs/{model_id}/checkpoints")
    @may("train")
    async def list_checkpoints_of_run(
        request: Request, model_id: str, limit: Limit = 1000, offset: Offset = 0
    ) -> Response:
        return _answer(await checkpoints.page(principal_of(request), model_id, limit, offset))

    @router.get("/checkpoints")
    @may("train")
    async def list_checkpoints(request: Request, limit: Limit = 100, offset: Offset = 0) -> Response:
        return _answer(await checkpoints.page(principal_of(request), None, limit, offset))

    @router.delete("/training_runs/{model_id}/checkpoints/{folder}/{name}")
    @may("train")
    async def delete_checkpoint(request: Request, model_id: str, folder: str, name: str) -> Response:
        await checkpoints.delete(principal_of(request), CheckpointPath.of(model_id, folder, name))
        return _answer({})

    @router.put("/training_runs/{model_id}/checkpoints/{folder}/{name}/ttl")
    @may("train")
    async def set_checkpoint_ttl(request: Request, model_id: str, folder: str, name: str) -> Response:
        asked = await _body(request, requests.TtlRequest)
        await checkpoints.set_ttl(principal_of(request), CheckpointPath.of(model_id, folder, name), asked.ttl_seconds)
        return _answer({})

    for path, sentence in _NOT_DONE.items():
        router.add_api_route(f"/{path}", _not_done(sentence), methods=["POST"])
    return router


def _not_done(sentence: str) -> Callable[[], Awaitable[Response]]:
    @may("session")
    async def refuse() -> Response:
        raise NotFoundError(f"this server does not do that: {sentence}")  # the SDK would try a 501 again

    return refuse


async def _body(request: Request, kind: type[B]) -> B:
    return await read(request, kind.read)


def _answer(content: Mapping[str, Any] | bytes, status: int = 200) -> Response:
    if isinstance(content, bytes):
        return Response(content, status, media_type=results.PROTOBUF)
    return Response(json.dumps(content), status, media_type=_JSON)


def status_of(error: LorayError) -> int:
    return 400 if error.status in _USERS else error.status


def failed(error: Exception) -> Response:
    """Make the response to any error."""
    if not isinstance(error, LorayError):
        _log.error("unexpected error", exc_info=error)
        return _refused(500, "internal error; the server's log has the details")
    response = _refused(status_of(error), str(error))
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return response


def _invalid(error: RequestValidationError) -> RequestError:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    return RequestError(f"{param}: {first['msg']}", param)


def _refused(status: int, message: str) -> Response:
    return _answer({"detail": message}, status)


def _max_body_bytes(scope: Scope) -> int:
    return MAX_PASS_BYTES if scope["path"].endswith(_PASS) else MAX_BODY_BYTES


class TinkerSpec(Frozen):
    """`host`: where Serve listens, as for the catalog's API."""

    host: str = "127.0.0.1"


def build(args: dict[str, Any]) -> Application:
    """Build the application. `args` are TinkerSpec's fields; the environment (LORAY_*) configures the rest. Which bases
    there are is asked of the gateways: a change of them leaves this application alone.

    Raises SpecError on a wrong field.
    """
    spec = TinkerSpec.parse(args, source="args of serve_apps.tinker.app:build")
    settings = Settings.from_env()
    environment = {"env_vars": settings.to_env(secrets=False) | settings.to_serving_env()}

    def app() -> FastAPI:  # called in the front's process
        return _app(spec)

    front = serve.deployment(
        serve.ingress(app)(),
        name=FRONT,
        num_replicas=1,  # which alone knows the samples that are under way
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0, "resources": ON_THE_HEAD, "runtime_env": environment},
        health_check_period_s=5.0,
    )
    return front.bind()


def _app(spec: TinkerSpec) -> FastAPI:
    from loray.telemetry import configure_logging
    from serve_apps.accounting.access_log import log_access
    from serve_apps.auth import open_auth
    from serve_apps.serve_internals import reachable_host

    settings = Settings.from_env()
    configure_logging(settings.log_level)
    access = open_auth(settings, reachable_host(spec.host))
    app = log_access(create_app(open_front(settings), access), settings.access_log)
    app.add_middleware(WithoutRequestId)
    return app

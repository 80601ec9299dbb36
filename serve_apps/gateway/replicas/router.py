"""Ray Serve's request router, which knows which replica holds which adapter.

Serve says which replicas there are. Which adapters they hold, and how many requests of other gateways they have, they
report to this process (`serve_apps.channel`); its own requests the process knows itself (`OwnRequests`). Serve creates
one router per handle, in the handle's process (the gateway's), and calls it on an event loop of its own.

The adapter is read from the request. Serve's `multiplexed_model_id` has side effects: without MultiplexMixin, Serve
keeps every such request for ever; with it, requests wait for a replica that announces the model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from loray.policy.prefixes import TOLD_BLOCKS, told_names
from loray.policy.routing import (
    REASONS,
    Candidate,
    Known,
    Reason,
    ReplicaView,
    Routing,
    RoutingPolicy,
    RoutingReport,
    RoutingReports,
    routing_key,
)
from loray.spec import NEVER, GenerateRequest
from loray.telemetry import get_logger

# By import path, for RequestRouterConfig. Serve pickles a class by value if the named module defines it, which would
# give every router its own copy of the state below, and by reference if the module imports it.
ROUTER_CLASS = "serve_apps.app.AdapterRouter"
_NOTHING = RoutingReport("", -1)  # of a replica that has not reported yet
_SUSPECT_S = 10.0  # longer than Serve needs to replace a replica whose engine has stopped
_ALIVE_S = 10.0  # since its last report, in which a replica is not asked whether it answers: as long as Serve's cache

_log = get_logger(__name__)


class _OwnRequest(NamedTuple):
    """`replica`: where it is, or is sent to; `num_tokens`: of its prompt, until its first token has come."""

    replica: str | None = None
    num_tokens: int = 0
    is_accepted: bool = False


class OwnRequests:
    """The requests of this process, on which replicas they are, and the tokens of the prompts that wait there for a
    first token. The gateway says when a request begins and ends, the routers where it is, in threads of their own.

    A request counts from the choice of its replica on, so that those that come at once do not all find the same replica
    idle.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._requests: dict[str, _OwnRequest] = {}
        self._num: Counter[str] = Counter()  # by replica, as the tokens
        self._tokens: Counter[str] = Counter()

    def num(self, replica: str) -> int:
        """The requests on the replica, and those that are sent there."""
        return self._num[replica]

    def tokens(self, replica: str) -> int:
        """The tokens of those of their prompts that wait for a first token."""
        return self._tokens[replica]

    def replica_of(self, request_id: str) -> str | None:
        """Name the replica that has accepted the request, until its end."""
        request = self._requests.get(request_id)
        return request.replica if request is not None and request.is_accepted else None

    def begin(self, request_id: str) -> None:
        with self._lock:
            self._requests[request_id] = _OwnRequest()

    def place(self, request_id: str, replica: str | None, num_tokens: int = 0) -> None:
        """The request is sent to this replica; None: one is chosen anew. `num_tokens`: of its prompt. Nothing happens
        once the request has ended, of which a router may not know yet.
        """
        self._update(request_id, replica=replica, num_tokens=num_tokens, is_accepted=False)

    def accepted(self, request_id: str, replica: str) -> None:
        """The replica has accepted the request, which may be answered already."""
        self._update(request_id, replica=replica, is_accepted=True)

    def answered(self, request_id: str) -> None:
        """The request's first token has come."""
        self._update(request_id, num_tokens=0)

    def _update(self, request_id: str, **fields: Any) -> None:
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None:
                self._count(request, -1)
                self._requests[request_id] = request = request._replace(**fields)
                self._count(request, 1)

    def end(self, request_id: str) -> None:
        with self._lock:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._count(request, -1)

    def _count(self, request: _OwnRequest, sign: int) -> None:
        replica = request.replica
        if replica is not None:
            self._num[replica] += sign
            self._tokens[replica] += sign * request.num_tokens
            if not self._num[replica]:
                del self._num[replica], self._tokens[replica]


# What this process knows. Its routers and its gateway share it.
_decisions: dict[str, dict[Reason, int]] = {}  # by deployment: there is one for each base
_replicas: dict[str, frozenset[str]] = {}  # by deployment
_suspects: dict[str, float] = {}  # replica → end of suspicion; used by the routers' event loop and the gateway's

own = OwnRequests()
reports = RoutingReports()  # the gateway's listener writes them, in the gateway's event loop


def decisions(deployment: str) -> dict[str, int]:
    """Count the requests routed to a deployment by this process, by reason (`loray.policy.routing.Reason`)."""
    return {str(reason): n for reason, n in _decisions.get(deployment, dict.fromkeys(REASONS, 0)).items()}


def replicas(deployment: str) -> frozenset[str]:
    """Return the names of a deployment's replicas, as Serve has given them last."""
    return _replicas.get(deployment, frozenset())


def is_held(deployment: str, besides: str, digest: str) -> bool:
    """Tell whether another replica of the deployment than `besides` has reported that it has the adapter."""
    key = routing_key(digest)
    known = (reports.of(name) for name in replicas(deployment) if name != besides)
    return any(key in k.report.in_pool or key in k.report.on_host for k in known if k is not None)


def suspect(replica: str) -> None:
    """Make routers avoid a replica that does not answer or whose engine has stopped, until Serve has replaced it."""
    now = time.monotonic()
    for name in [n for n, until in list(_suspects.items()) if until < now]:
        _suspects.pop(name, None)
    _suspects[replica] = now + _SUSPECT_S


class AdapterRouter(RequestRouter):  # type: ignore[misc]
    """Returns every candidate as a group of its own: within a group, Serve chooses the replica with the shortest queue.

    It overrides private methods of Serve's router where Serve has no public hook; each says why.
    """

    def initialize_state(self, **policy: Any) -> None:
        """`block_tokens`: of the replicas' pools; `policy`: RoutingPolicy's fields."""
        self._block_tokens = policy.pop("block_tokens", 16)
        self._routing = Routing(RoutingPolicy(**policy))
        self._seen: dict[str, RoutingReport] = {}  # the last report of each replica
        self._deployment = str(self._deployment_id.name)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve calls it again, with pauses, until a replica accepts the request."""
        now = time.monotonic()
        requests = _requests(pending_request)
        request = requests[0] if requests else None
        for one in requests:
            own.place(one.request_id, None)
        views = [self._view(r, now) for r in candidate_replicas]
        self._remind(candidate_replicas, views)
        tie = "" if request is None else request.request_id
        prefix = getattr(pending_request, "prefix", None)
        if prefix is None:
            prefix = self._prefix(request) if len(views) > 1 else ()
        ranked = self._routing.rank(views, _adapter(request), now=now, tie=tie, prefix=prefix)
        if request is not None and ranked:
            num_tokens = len(request.prompt_ids) + len(request.output_ids)
            chosen = next(view for view in views if view.id == ranked[0].replica)
            num_known = self._routing.num_known(chosen, prefix) * TOLD_BLOCKS * self._block_tokens
            for one in requests:
                own.place(one.request_id, chosen.id, num_tokens - num_known)
        if pending_request is not None:
            pending_request.ranked, pending_request.prefix = ranked, prefix
            pending_request.routing_context.should_backoff = True  # every replica has been offered
        replicas = {_name(r): r for r in candidate_replicas}
        return [[replicas[c.replica]] for c in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called when a replica has accepted the request."""
        requests = _requests(pending_request)
        if not requests:
            return
        for request in requests:
            own.accepted(request.request_id, str(replica_id.unique_id))
        ranked: Sequence[Candidate] = getattr(pending_request, "ranked", ())
        chosen = next((c for c in ranked if c.replica == replica_id.unique_id), None)
        if chosen is not None:
            prefix: Sequence[str] = getattr(pending_request, "prefix", ())
            self._routing.sent(chosen, _adapter(request), now=time.monotonic(), prefix=prefix)
            _decisions.setdefault(self._deployment, dict.fromkeys(REASONS, 0))[chosen.reason] += len(requests)
            _log.debug("request %s to replica %s: %s", request.request_id, chosen.replica, chosen.reason)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called whenever a replica is added or removed."""
        _replicas[self._deployment] = names = frozenset(map(_name, replicas))
        self._routing.retain(names)
        self._seen = {name: report for name, report in self._seen.items() if name in names}
        super().update_replicas(replicas)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        suspect(replica_id.unique_id)
        super().on_replica_actor_unavailable(replica_id)

    def _remind(self, replicas: Sequence[RunningReplica], views: Sequence[ReplicaView]) -> None:
        """Tell Serve the lengths of queues that it has forgotten, as it does after ten seconds without a request, of
        replicas that live. Otherwise it asks the replica chosen for a request, which takes time.
        """
        for replica, view in zip(replicas, views, strict=True):
            is_known = self.replica_queue_len_cache.get(replica.replica_id) is not None
            if not is_known and not view.suspect and view.age_s <= _ALIVE_S:
                self.replica_queue_len_cache.update(replica.replica_id, view.load)

    def _get_pending_request_matching_internal_request_id(self, request_metadata: Any = None) -> PendingRequest | None:
        """Find the request with these metadata, for whose adapter a replica was chosen.

        Private in Serve, which matches by an id that all calls of one HTTP request share (`n`, several prompts): it
        would find only the first of them, and the others would wait for ever.
        """
        for pending in self._pending_requests_to_fulfill:  # private: Serve's queue of these requests
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None

    def _prefix(self, request: GenerateRequest | None) -> Sequence[str]:
        """Name the prefixes that spare the replica a part of a request's prompt."""
        if request is None or (request.pooling is not None and request.pooling.kind == "mean"):
            return ()
        if request.params.prompt_logprobs is not None and not request.output_ids:
            return ()  # each token is computed, as for a mean
        ref, tokens = request.adapter, (*request.prompt_ids, *request.output_ids)
        active_from = 0 if ref is None else ref.active_from(request.prompt_ids)
        digest = None if ref is None or active_from == NEVER else ref.digest
        return told_names(digest, tokens[:-1], self._block_tokens, salt=request.cache_salt, active_from=active_from)

    def _view(self, replica: RunningReplica, now: float) -> ReplicaView:
        name = _name(replica)
        report, at, num_of_others = reports.of(name) or Known(_NOTHING, now)
        if self._seen.get(name, _NOTHING) is not report:
            self._seen[name] = report
            self._routing.reported(name, report.in_pool | report.on_host)
        return ReplicaView(
            id=name,
            load=own.num(name) + num_of_others,
            limit=replica.max_ongoing_requests,
            in_pool=report.in_pool,
            on_host=report.on_host,
            age_s=now - at,
            suspect=_suspects.get(name, now) > now,
            unanswered=own.tokens(name),
            prefixes=report.prefixes,
        )


def _name(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)


def _requests(pending: PendingRequest | None) -> list[GenerateRequest]:
    """The requests of a call of `EngineReplica.generate_to`, all with one prompt and adapter; none for other calls."""
    args = () if pending is None else pending.args
    if not args or not isinstance(args[0], GenerateRequest):
        return []
    return [args[0], *(request for request, _ in (args[4] if len(args) > 4 else ()))]


def _adapter(request: GenerateRequest | None) -> str | None:
    return None if request is None or request.adapter is None else routing_key(request.adapter.digest)

"""Every route of both applications: who may call it, and a request for something of a tenant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

OPEN = "open"  # without a key
READ = frozenset({"infer", "publish", "promote", "train"})  # who may see adapters
ANY = READ | {"tenant_admin"}  # any key
MAKERS = READ - {"infer"}  # who may make adapters or change where aliases point
FOLLOW, AUDIT, OWN = frozenset({"train", "tenant_admin"}), MAKERS | {"tenant_admin"}, frozenset({"tenant_admin"})
NOBODY: frozenset[str] = frozenset()  # administrators of all alone
INFER, PUBLISH, PROMOTE, TRAIN = (frozenset({scope}) for scope in ("infer", "publish", "promote", "train"))


class Thing(NamedTuple):
    """What a request is about. The default: nothing that exists."""

    tenant: str = "acme"
    name: str = "nope-7"
    alias: str = "none"
    digest: str = "f" * 64
    job: str = "job-nope"
    key: str = "key-nope"
    upload: str = "0" * 32
    file: str = "file-nope"
    batch: str = "batch-nope"
    session: str = "session-nope"

    @property
    def model(self) -> str:
        return f"{self.tenant}/{self.name}"

    def hidden_in(self, text: str) -> str:
        """`text` without the words of this thing: answers about two things of which neither exists are equal then."""
        for field_name, value in sorted(self._asdict().items(), key=lambda item: -len(item[1])):
            if field_name != "tenant":
                text = text.replace(value, f"<{field_name}>")
        return text.replace(self.digest[:12], "<digest>")


@dataclass(frozen=True)
class Route:
    """`scopes`: one of them is enough. `body` and `query` have the fields of Thing in braces. `status`: what an open
    route answers.
    """

    scopes: frozenset[str] | str
    body: dict[str, Any] | None = None
    query: dict[str, str] = field(default_factory=dict)
    status: int = 200

    def fields(self, thing: Thing) -> dict[str, Any]:
        return {} if self.body is None else {"json": _filled(self.body, thing)}

    def params(self, thing: Thing) -> dict[str, str]:
        filled = _filled(self.query, thing)
        assert isinstance(filled, dict)
        return filled


def _filled(value: Any, thing: Thing) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, thing) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, thing) for item in value]
    return value.format(**thing._asdict(), model=thing.model) if isinstance(value, str) else value


_DOCUMENTS = {f"GET /{page}": Route(OPEN) for page in ("openapi.json", "docs", "docs/static/{name}")}
_MODEL: dict[str, Any] = {"model": "{model}"}
_SHORT = _MODEL | {"max_tokens": 1}
_CHAT = _SHORT | {"messages": [{"role": "user", "content": "hi"}]}

GATEWAY: dict[str, Route] = _DOCUMENTS | {
    "GET /health": Route(OPEN),
    "GET /ping": Route(OPEN),
    "POST /ping": Route(OPEN),
    "GET /version": Route(OPEN),
    "GET /console": Route(OPEN, status=307),  # leads to the catalog's
    "GET /status": Route(NOBODY),
    "GET /metrics": Route(NOBODY),
    "GET /v1/models": Route(READ),
    "GET /v1/models/{model:path}": Route(READ),
    "POST /v1/completions": Route(INFER, _SHORT | {"prompt": "hi"}),
    "POST /v1/chat/completions": Route(INFER, _CHAT),
    "POST /v1/responses": Route(INFER, _MODEL | {"input": "hi"}),
    "GET /v1/responses/{id}": Route(INFER),
    "DELETE /v1/responses/{id}": Route(INFER),
    "POST /v1/responses/{id}/cancel": Route(INFER),
    "GET /v1/responses/{id}/input_items": Route(INFER),
    "POST /invocations": Route(INFER, _CHAT),
    "POST /v1/embeddings": Route(INFER, _MODEL | {"input": "hi"}),
    "POST /v1/messages": Route(INFER, _CHAT),
    "POST /v1/messages/count_tokens": Route(INFER, _CHAT),
    "POST /tokenize": Route(INFER, _MODEL | {"prompt": "hi"}),
    "POST /detokenize": Route(INFER, _MODEL | {"tokens": [1]}),
    "POST /v1/load_lora_adapter": Route(PUBLISH, {"lora_name": "{model}"}),
    "POST /v1/unload_lora_adapter": Route(PUBLISH, {"lora_name": "{model}"}),
}

_OF = {"tenant": "{tenant}"}
FILES = frozenset({"infer", "train"})
GATEWAY |= {
    "POST /v1/files": Route(FILES, {}),
    "GET /v1/files": Route(FILES),
    "GET /v1/files/{file_id}": Route(FILES),
    "GET /v1/files/{file_id}/content": Route(FILES),
    "DELETE /v1/files/{file_id}": Route(FILES),
    "POST /v1/batches": Route(
        INFER, {"input_file_id": "{file}", "endpoint": "/v1/completions", "completion_window": "24h"}
    ),
    "GET /v1/batches": Route(INFER),
    "GET /v1/batches/{batch_id}": Route(INFER),
    "POST /v1/batches/{batch_id}/cancel": Route(INFER),
    "POST /v1/fine_tuning/jobs": Route(TRAIN, {"model": "smollm2", "training_file": "{file}"}),
    "GET /v1/fine_tuning/jobs": Route(TRAIN),
    "GET /v1/fine_tuning/jobs/{id}": Route(TRAIN),
    "POST /v1/fine_tuning/jobs/{id}/cancel": Route(TRAIN),
    "GET /v1/fine_tuning/jobs/{id}/events": Route(TRAIN),
    "GET /v1/fine_tuning/jobs/{id}/checkpoints": Route(TRAIN),
    "POST /v1/fine_tuning/jobs/{id}/pause": Route(TRAIN),
    "POST /v1/fine_tuning/jobs/{id}/resume": Route(TRAIN),
    "GET /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions": Route(TRAIN),
    "POST /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions": Route(TRAIN),
    "DELETE /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions/{id}": Route(TRAIN),
}

_NAME, _ALIAS = "/adapters/{name}", "/adapters/{name}/aliases/{alias}"
_VERSION = "/adapters/{name}/versions/{version}"
_RECIPE = {
    "name": "{name}",
    "base": "smollm2",
    "adapter": {"method": "lora", "rank": 4},
    "data": {"train": "s3://bucket/data.jsonl"},
    "batch": {"rows": 1},
    "optimizer": {"learning_rate": 0.1},
    "max_steps": 0,  # refused, so that nothing is submitted
}

API: dict[str, Route] = _DOCUMENTS | {
    "GET /console": Route(ANY),
    "GET /console/live": Route(ANY),
    "GET /console/login": Route(OPEN),
    "POST /console/login": Route(OPEN, {"key": "{key}"}, status=401),
    "POST /console/logout": Route(ANY),
    "GET /console/static/{name}": Route(OPEN),
    "GET /console/adapters": Route(READ, query=_OF),
    f"GET /console{_NAME}": Route(READ, query=_OF),
    f"GET /console{_VERSION}": Route(READ, query=_OF),
    f"GET /console{_VERSION}/download": Route(MAKERS, query=_OF),
    f"GET /console{_NAME}/diff": Route(READ, query=_OF | {"old": "1", "new": "1"}),
    f"POST /console{_ALIAS}": Route(PROMOTE, query=_OF | {"version": "1"}),
    f"POST /console{_ALIAS}/rollback": Route(PROMOTE, query=_OF),
    f"POST /console{_ALIAS}/canary": Route(PROMOTE, query=_OF | {"version": "1", "percent": "10"}),
    f"POST /console{_ALIAS}/canary/end": Route(PROMOTE, query=_OF),
    "GET /console/uploads": Route(PUBLISH),
    "POST /console/uploads": Route(PUBLISH),
    "PUT /console/uploads/{id}/files/{name}": Route(PUBLISH, {}),
    "POST /console/uploads/{id}/publish": Route(PUBLISH, {"name": "new", "aliases": ""}),
    "DELETE /console/uploads/{id}": Route(PUBLISH),
    "GET /console/playground": Route(INFER, query={"model": "{model}"}),
    "POST /console/playground/chat": Route(INFER, _CHAT),
    "GET /console/playground/models": Route(INFER),
    "GET /console/playground/tier": Route(INFER, query=_MODEL),
    "GET /console/files": Route(FILES),
    "PUT /console/files": Route(FILES, {}),
    "GET /console/files/{id}/content": Route(FILES),
    "POST /console/files/{id}/delete": Route(FILES),
    "GET /console/batches": Route(INFER),
    "GET /console/batches/{id}": Route(INFER),
    "GET /console/batches/{id}/live": Route(INFER),
    "POST /console/batches/{id}/cancel": Route(INFER),
    "GET /console/jobs": Route(FOLLOW),
    "GET /console/jobs/compare": Route(FOLLOW, query={"job": "{job}"}),
    "GET /console/jobs/{id}": Route(FOLLOW),
    "GET /console/jobs/new": Route(TRAIN),
    "POST /console/jobs/plan": Route(TRAIN, {"name": "new"}),
    "POST /console/jobs": Route(TRAIN, {"name": "new"}),
    "GET /console/jobs/{id}/live": Route(FOLLOW),
    "POST /console/jobs/{id}/stop": Route(TRAIN),
    "POST /console/jobs/{id}/publish": Route(PUBLISH, query={"digest": "{digest}"}),
    "GET /console/sessions": Route(FOLLOW),
    "GET /console/sessions/{id}": Route(FOLLOW),
    "GET /console/sessions/{id}/live": Route(FOLLOW),
    "POST /console/sessions/{id}/stop": Route(TRAIN),
    "GET /console/serving": Route(NOBODY),
    "GET /console/serving/live": Route(NOBODY),
    "GET /console/serving/replicas/{name}": Route(NOBODY),
    "GET /console/serving/replicas/{name}/live": Route(NOBODY),
    "GET /console/usage": Route(ANY),
    "GET /console/keys": Route(OWN, query=_OF),
    "POST /console/keys": Route(OWN, {"key_alias": "console", "tenant": "{tenant}", "scopes": "infer"}),
    "POST /console/keys/{id}/revoke": Route(OWN),
    "POST /console/tenants": Route(NOBODY, {"name": "{tenant}"}),
    "POST /console/tenants/{name}/block": Route(NOBODY),
    "GET /adapters": Route(READ, query=_OF),
    f"GET {_NAME}": Route(READ, query=_OF),
    f"PATCH {_NAME}": Route(PUBLISH, {"visibility": "public"}, _OF),
    f"DELETE {_NAME}": Route(PUBLISH, query=_OF),
    f"POST {_NAME}/restore": Route(PUBLISH, query=_OF),
    f"GET {_NAME}/versions": Route(READ, query=_OF),
    f"POST {_NAME}/versions": Route(PUBLISH, {"digest": "{digest}"}, _OF),
    f"GET {_VERSION}": Route(READ, query=_OF),
    f"DELETE {_VERSION}": Route(PUBLISH, query=_OF),
    f"POST {_VERSION}/restore": Route(PUBLISH, query=_OF),
    f"POST {_VERSION}/evaluations": Route(
        PUBLISH, {"evaluations": [{"metric": "acc", "value": 0.5, "dataset": "letters"}]}, _OF
    ),
    f"GET {_VERSION}/download": Route(MAKERS, query=_OF),
    f"DELETE {_VERSION}/quarantine": Route(NOBODY, query=_OF),
    "POST /uploads": Route(PUBLISH),
    "GET /uploads/{id}": Route(PUBLISH),
    "PUT /uploads/{id}/files/{name}": Route(PUBLISH, {}),
    "DELETE /uploads/{id}": Route(PUBLISH),
    f"GET {_NAME}/placement": Route(READ, query=_OF),
    f"GET {_NAME}/aliases": Route(READ, query=_OF),
    f"GET {_ALIAS}": Route(READ, query=_OF),
    f"PUT {_ALIAS}": Route(PROMOTE, {"version": 1}, _OF),
    f"DELETE {_ALIAS}": Route(PROMOTE, query=_OF),
    f"POST {_ALIAS}/rollback": Route(PROMOTE, query=_OF),
    f"GET {_ALIAS}/canary": Route(READ, query=_OF),
    f"PUT {_ALIAS}/canary": Route(PROMOTE, {"version": 1, "percent": 10}, _OF),
    f"DELETE {_ALIAS}/canary": Route(PROMOTE, query=_OF),
    f"GET {_NAME}/tags": Route(READ, query=_OF),
    f"PUT {_NAME}/tags/{{key}}": Route(PUBLISH, {"value": "gold"}, _OF),
    f"DELETE {_NAME}/tags/{{key}}": Route(PUBLISH, query=_OF),
    f"POST {_NAME}/transfer": Route(NOBODY, {"tenant": "beta"}, _OF),
    "GET /bases": Route(ANY),
    "GET /recommend": Route(ANY, query={"context_length": "1024", "num_tasks": "3"}),
    "POST /jobs": Route(TRAIN, _RECIPE),
    "GET /jobs": Route(FOLLOW, query={"name": "{tenant}/{name}"}),
    "GET /jobs/{id}": Route(FOLLOW),
    "GET /jobs/{id}/logs": Route(FOLLOW),
    "POST /jobs/{id}/stop": Route(TRAIN),
    "POST /keys": Route(OWN, {"key_alias": "ci", "tenant": "{tenant}"}),
    "GET /keys": Route(OWN, query=_OF),
    "GET /keys/self": Route(ANY),
    "GET /keys/{id}": Route(OWN),
    "PATCH /keys/{id}": Route(OWN, {"blocked": True}),
    "DELETE /keys/{id}": Route(OWN),
    "POST /keys/{id}/rotate": Route(OWN, {}),  # and the key itself
    "POST /tenants": Route(NOBODY, {"name": "{tenant}"}),
    "GET /tenants": Route(NOBODY),
    "GET /tenants/{name}": Route(NOBODY),
    "PATCH /tenants/{name}": Route(NOBODY, {"blocked": True}),
    "GET /audit": Route(AUDIT, query=_OF),
    "GET /usage": Route(ANY, query=_OF),
}

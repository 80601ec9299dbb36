"""All limits of a server on one page: what each is for, its default, what sets it, and what lies beyond it.

The numbers stand where they are used and are imported here, and statuses and codes are those that the errors get.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from docs.site.markdown import table
from loray import local
from loray.adapters.files import MAX_CONFIG_BYTES
from loray.catalog import batches, files, identity
from loray.catalog.adapters import MAX_REPORTED, MAX_TAGS
from loray.errors import (
    AdapterNotFound,
    BaseStarting,
    CatalogError,
    CatalogFull,
    ConflictError,
    ContextLengthExceeded,
    DeadlineExceeded,
    GrammarTooExpensive,
    LimitExceeded,
    LorayError,
    Overloaded,
    PermissionDenied,
    RateLimited,
    RequestError,
    SpecError,
    StoreError,
)
from loray.policy.quotas import LEAST_URGENT, MOST_URGENT
from loray.publishing import uploads
from loray.publishing.convert import MAX_MEMORY_BYTES
from loray.schemas.openai import fields, requests, structured
from loray.schemas.openai.embeddings import MAX_INPUT_TOKENS, MAX_INPUTS
from loray.schemas.openai.requests import MAX_LOGPROBS
from loray.schemas.resources import problem_type
from loray.scratch import SHARE
from loray.settings import DEFAULT_KEY_MAX_AGE_S, DEFAULT_MAX_JOBS, DEFAULT_MAX_WORKERS, DEFAULT_SNAPSHOT_BYTES
from loray.spec import (
    DEFAULT_KEEP_DELETED_S,
    DEFAULT_MAX_ADAPTERS,
    MAX_DESCRIPTION_CHARACTERS,
    MAX_EVALUATIONS,
    MAX_MANIFEST_BYTES,
    MAX_RECIPE_BYTES,
    MAX_TEMPLATE_CHARACTERS,
    MAX_TEMPLATE_CHARACTERS_OF_TENANT,
    MAX_VERSIONS,
    ServeSpec,
)
from loray.spec.generation import MAX_CHARACTERS
from loray.text import templates
from loray.text.grammar import MASK_BUDGET_GPU_S, MASK_BUDGET_S, MAX_MEAN_MASK_S, MAX_NESTING, MIN_MASKS
from serve_apps import auth, http, places
from serve_apps.accounting.accounts import LONGEST_S
from serve_apps.api import conversions, services
from serve_apps.api.problems import MAX_BODY_BYTES, status_of
from serve_apps.api.routes.jobs import LONGEST_FOLLOWED_S
from serve_apps.batches import validation
from serve_apps.gateway import bases, directory
from serve_apps.gateway import bases as prompts
from serve_apps.gateway import directory as models
from serve_apps.gateway.errors import ROUTE_CODES, failure_of
from serve_apps.gateway.files import upload
from serve_apps.standalone.server import HEADERS_S, SEND_S


class Limit(NamedTuple):
    """One row, as Markdown. `set_by`: the field or variable that sets it; without one it is fixed."""

    what: str
    limit: str
    beyond: str
    set_by: str = "fixed"


_SPEC = ServeSpec()
_PROXY = (Path(local.__file__).parent / "haproxy.sh").read_text(encoding="utf-8")


def _bytes(number: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number % factor == 0:
            return f"{number // factor:,} {unit}"
    return f"{number:,} bytes"


def _time(seconds: float) -> str:
    for unit, factor in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds == factor:
            return {"days": "a day", "hours": "an hour", "minutes": "a minute"}[unit]
        if seconds > factor and seconds % factor == 0:
            return f"{seconds / factor:.0f} {unit}"
    return f"{seconds:g} s"


def _of_proxy(setting: str) -> str:
    """A time in seconds that follows `setting` in HAProxy's configuration."""
    found = re.search(re.escape(setting) + r"(\d+)", _PROXY)
    assert found is not None, setting
    return _time(float(found[1]))


def _gateway(error: LorayError) -> str:
    """The status of the gateway's answer, and its code where it has one."""
    failure = failure_of(error)
    return f"{failure.status}, `{failure.error.code}`" if failure.error.code else str(failure.status)


def _route(status: int) -> str:
    return f"{status}, `{ROUTE_CODES[status]}`"


def _api(error: type[LorayError]) -> str:
    """The status of the catalog's API, and the type of the problem without its URN."""
    return f"{status_of(error)}, `{problem_type(error).rpartition(':')[2]}`"


_WRONG = _gateway(RequestError("wrong"))
_TOO_LONG = _gateway(ContextLengthExceeded("too long"))
_BUSY = _gateway(Overloaded("busy", 1.0))
_FULL, _SLOWER, _NO_MORE = _api(Overloaded), _api(RateLimited), _api(LimitExceeded)

REQUESTS = (
    Limit(
        "the body",
        f"{bases.BYTES_PER_TOKEN} bytes for each token of the longest context that is served, or of the embeddings of "
        f"one request where a base pools, at least "
        f"{_bytes(bases.MIN_BODY_BYTES)}, at most {_bytes(bases.MAX_BODY_BYTES)}",
        f"{_route(413)}, before it is read if `Content-Length` says so",
        "`max_body_bytes`",
    ),
    Limit(
        "a request's headers",
        f"{_time(HEADERS_S)} with `loray serve`, {_of_proxy('timeout http-request ')} behind HAProxy",
        "the connection ends",
    ),
    Limit(
        "how long a body comes",
        f"{_time(http.BODY_S)}, and a second more for each {_bytes(http.BODY_BYTES_PER_S)} that have come",
        _route(408),
    ),
    Limit(
        "a client that takes nothing of its answer",
        f"{_time(SEND_S)} with `loray serve` on Linux, {_of_proxy('TIMEOUT_CLIENT_S:-')} behind HAProxy",
        "the connection ends, and the request in the engine",
        "`RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S` behind HAProxy",
    ),
    Limit(
        "an answer",
        _time(_SPEC.request_timeout_s or 0),
        _gateway(DeadlineExceeded("late")),
        "`request_timeout_s`; the header `X-Request-Timeout-S` for less",
    ),
    Limit(
        "JSON",
        f"{http.MAX_DEPTH} levels, {http.MAX_ARRAYS_AND_OBJECTS:,} arrays and objects, {http.MAX_VALUES:,} "
        f"values, {http.MAX_MEMBERS:,} members of an object",
        _WRONG,
    ),
    Limit(
        "a text, and all texts of a chat together: contents, names, ids, calls, tools, `chat_template_kwargs`",
        "as many characters as the context's tokens can have, by the longest token of the vocabulary",
        f"{_TOO_LONG}, before it is tokenised",
        "`max_model_len`",
    ),
    Limit("messages of a chat", "one for each token of the context", _TOO_LONG, "`max_model_len`"),
    Limit("`tools`", f"{requests.MAX_TOOLS}, each with a description of {fields.MAX_DESCRIPTION:,} characters", _WRONG),
    Limit(
        "`chat_template_kwargs`, `metadata`, `reasoning`", f"{fields.MAX_OBJECT_CHARACTERS:,} characters each", _WRONG
    ),
    Limit("names, `user`, hints such as `prompt_cache_key`", f"{fields.MAX_SHORT_CHARACTERS} characters each", _WRONG),
    Limit(
        "`priority`",
        f"−{-MOST_URGENT:,} to {LEAST_URGENT}, and not below 0 unless the key "
        "[may](../guide/access.md#limits-of-requests)",
        "the nearest one is taken; the header `X-Loray-Priority` of the answer says which",
        "`min_priority` of key and tenant",
    ),
    Limit(
        "an adapter's own chat template",
        f"{_time(templates.TIMEOUT_S)} for a prompt; {templates.MAX_SLOW} of more than {_time(templates.SLOW_S)} in "
        f"{_time(templates.SLOW_WINDOW_S)}",
        f"{_WRONG}, and for {_time(templates.REFUSED_S)} for all its requests",
    ),
    Limit(
        "rendering adapters' own chat templates",
        f"one prompt of a tenant at a time, {prompts.OWN_TEMPLATES.total} of all, tenants in turn, for each base; a "
        f"wait of {_time(prompts.OWN_TEMPLATES.wait_s)}",
        _BUSY,
    ),
    Limit(
        f"tokenising texts of more than {prompts.VERY_LONG:,} characters",
        f"one of all at a time, tenants in turn; a wait of {_time(prompts.LONG_TEXTS.wait_s)}",
        _BUSY,
    ),
    Limit("prompts × `n`", f"{fields.MAX_CHOICES}", _WRONG),
    Limit("embeddings of one request", f"{MAX_INPUTS:,} inputs, {MAX_INPUT_TOKENS:,} tokens together", _WRONG),
    Limit("`logprobs`, `top_logprobs`, `prompt_logprobs`", f"{MAX_LOGPROBS}", _WRONG),
    Limit("`stop`", f"{fields.MAX_STOP_STRINGS} strings of {fields.MAX_STOP_CHARACTERS} characters", _WRONG),
    Limit(
        "`stop_token_ids`, `logit_bias`, `bad_words`",
        f"{fields.MAX_STOP_TOKENS}, {fields.MAX_BIASES:,}, {fields.MAX_BAD_WORDS}",
        _WRONG,
    ),
    Limit(
        "`GET /v1/models`",
        f"{models.MAX_CARDS:,} models of an answer (`has_more`), {models.LISTS.rpm_limit} lists a minute of a key",
        _gateway(RateLimited("too many", 1.0)),
    ),
    Limit(
        "`/health`, `/ping`",
        f"the replicas are asked every {_time(bases.FRESH_S)}, for all callers",
        "the last answer",
    ),
    Limit(
        "an unknown model",
        f"the catalog is read again for it every {1000 * directory.LOOK_AGAIN_S:.0f} ms at most, for all that ask",
        _gateway(AdapterNotFound("unknown")),
    ),
    Limit(
        "requests that wait in a replica",
        f"{_SPEC.max_queued}, and {_SPEC.max_loading} for their adapters",
        _BUSY,
        "`max_queued`, `max_loading`",
    ),
    Limit(
        "a wait for an adapter's load",
        _time(_SPEC.load_timeout_s),
        _gateway(StoreError("slow")),
        "`load_timeout_s`",
    ),
    Limit(
        "a wait for the first replica",
        _time(_SPEC.cold_start_timeout_s),
        _gateway(BaseStarting("starting", 1.0)),
        "`cold_start_timeout_s`",
    ),
    Limit("a wait for the tenant's turn while the gateway is late", _time(LONGEST_S), _BUSY),
)

CONSTRAINTS = (
    Limit("a schema, pattern, list of texts or grammar", f"{MAX_CHARACTERS:,} characters", _WRONG),
    Limit(
        "a schema",
        f"{structured.MAX_SCHEMA_NODES:,} values, {structured.MAX_SCHEMA_MEMBERS:,} members of an object, "
        f"{structured.MAX_SCHEMA_DEPTH} levels",
        _WRONG,
    ),
    Limit("choices of a list", f"{structured.MAX_CHOICES:,}", _WRONG),
    Limit("brackets inside each other, in patterns and grammars", f"{MAX_NESTING}", _WRONG),
    Limit(
        "time for masks in a step of the engine",
        f"{1000 * MASK_BUDGET_S:g} ms on a CPU, {1000 * MASK_BUDGET_GPU_S:g} ms on a GPU, on average over steps",
        "the request waits for later steps, tenants in turn",
    ),
    Limit(
        "a token's mask",
        f"{1000 * MAX_MEAN_MASK_S:g} ms in the mean, once a request has had {MIN_MASKS}",
        f"{_gateway(GrammarTooExpensive('slow'))}; the last event of a stream",
    ),
)

STORED = (
    Limit(
        "names of a tenant",
        f"{DEFAULT_MAX_ADAPTERS:,}",
        _NO_MORE,
        "`max_adapters` of key and tenant",
    ),
    Limit("versions of a name", f"{MAX_VERSIONS:,}", _NO_MORE),
    Limit(
        "chat templates of a tenant, those that differ",
        f"{MAX_TEMPLATE_CHARACTERS_OF_TENANT >> 20} Mi characters",
        _NO_MORE,
    ),
    Limit(
        "tensors of a tenant's versions, each digest once, with files of uploads that are not published",
        "none; also of what a job has trained, which fails then",
        _NO_MORE,
        "`max_stored_bytes` of key and tenant",
    ),
    Limit(
        "what is deleted",
        f"it counts for {_time(DEFAULT_KEEP_DELETED_S)}, as long as it can be restored",
        "`loray store gc` removes it",
    ),
    Limit("an adapter's files", f"{uploads.MAX_FILES}", _api(SpecError)),
    Limit(
        "a file",
        f"weights {_bytes(uploads.MAX_FILE_BYTES)}, `adapter_config.json` {_bytes(MAX_CONFIG_BYTES)}, README and "
        f"licence {_bytes(uploads.MAX_SMALL_BYTES)}; it says its `Content-Length`",
        "413; 411",
    ),
    Limit(
        "`loray.json`, with recipe, evaluations and chat template",
        f"{_bytes(MAX_MANIFEST_BYTES)}, {MAX_EVALUATIONS:,} evaluations, a description of "
        f"{MAX_DESCRIPTION_CHARACTERS:,} characters; larger ones that were published before stay readable",
        f"{_api(SpecError)}; 413 as a file",
    ),
    Limit("a chat template", f"{MAX_TEMPLATE_CHARACTERS:,} characters", f"{_api(SpecError)}; 413 as a file"),
    Limit("a recipe through the API", f"{_bytes(MAX_RECIPE_BYTES)} as JSON", _api(SpecError)),
    Limit("evaluations of a version that clients report", f"{MAX_REPORTED:,}", _api(ConflictError)),
    Limit("tags of a name", f"{MAX_TAGS}", _api(ConflictError)),
    Limit("uploads of a tenant that are not published", f"{uploads.MAX_OPEN}", _api(ConflictError)),
    Limit(
        "all names together, in each gateway's memory",
        f"{_bytes(DEFAULT_SNAPSHOT_BYTES)}, about 900,000 names",
        f"{_api(CatalogFull)}: nobody publishes, the API's log says so, and gateways go on",
        "`LORAY_SNAPSHOT_BYTES`",
    ),
)

FILES = (
    Limit("a file of `/v1/files`", "; ".join(f"{p} {_bytes(n)}" for p, n in upload.MAX_BYTES.items()), _route(413)),
    Limit("files of a tenant", f"{files.MAX_FILES:,}", _gateway(LimitExceeded("more"))),
    Limit(
        "all files of a tenant, with its adapters",
        "none",
        _gateway(LimitExceeded("more")),
        "`max_stored_bytes` of key and tenant",
    ),
    Limit("requests in a batch", f"{validation.MAX_LINES:,}", "the batch fails"),
    Limit("batches of a tenant that have not ended", f"{batches.MAX_UNFINISHED}", _gateway(RateLimited("more"))),
    Limit("requests in these batches", f"{batches.MAX_LINES:,}", "the batch fails"),
    Limit("time of a batch", _time(batches.WINDOW.total_seconds()), "`batch_expired` in its error file"),
)

JOBS = (
    Limit(
        "jobs of a tenant that have not ended",
        f"{DEFAULT_MAX_JOBS}",
        _SLOWER,
        "`max_jobs` of key and tenant, else `LORAY_MAX_JOBS`",
    ),
    Limit(
        "workers of these jobs together",
        f"{DEFAULT_MAX_WORKERS}",
        f"{_SLOWER}; of one job alone {_api(PermissionDenied)}",
        "`max_workers` of key and tenant, else `LORAY_MAX_WORKERS`",
    ),
)


def _places(most: places.MostPlaces) -> str:
    of_key = "" if most.of_key is None else f", {most.of_key} of a key"
    waiting = f"; more wait {_time(most.wait_s)}, {most.waiting} of a tenant" if most.wait_s else ""
    return f"{most.total}, {most.of_tenant} of a tenant{of_key}{waiting}"


CATALOG_API = (
    Limit("a request's body that is no file", _bytes(MAX_BODY_BYTES), "413"),
    Limit(
        "requests",
        f"{auth.KEY_RATE:g} a second and {auth.KEY_BURST:g} at once of a key, {auth.TENANT_RATE:g} a second and "
        f"{auth.TENANT_BURST:g} at once of a tenant; administrators: none",
        _SLOWER,
    ),
    Limit(
        "plans and recommendations (`/recommend`, the console's estimates of recipes)",
        f"{60 * auth.ADVICE_RATE:g} a minute of a key; administrators: none",
        _SLOWER,
    ),
    Limit("publications of uploads", _places(services.LONG), _FULL),
    Limit("files that are sent", _places(services.SENDING), _FULL),
    Limit("downloads, until they have been taken", _places(services.DOWNLOADS), _FULL),
    Limit(
        "conversions (`merged`, `gguf`)",
        f"as many as there are processors and memory for, 1 of a tenant, each {_time(conversions.DEADLINE_S)}",
        f"{_SLOWER}; {_api(DeadlineExceeded)}",
    ),
    Limit(
        "logs that are read or followed",
        f"{_places(services.FOLLOWERS)}; a log is followed for {_time(LONGEST_FOLLOWED_S)}",
        f"{_SLOWER}; the log's part ends",
    ),
    Limit(
        "temporary files on the server's disk",
        f"{100 * SHARE:.0f} % of what is free at its start; a file's length, two copies of an upload, a conversion",
        _FULL,
        "`LORAY_SCRATCH_BYTES` (`20GiB`)",
    ),
    Limit(
        "memory of conversions",
        f"{100 * conversions.MEMORY_SHARE:.0f} % of what is left in the machine or container when one begins; it takes "
        f"{_bytes(conversions.LEAST_BYTES)} to {_bytes(MAX_MEMORY_BYTES)} beside the base's files",
        f"{_SLOWER} while others are made, else {_FULL}",
    ),
)

KEYS = (
    Limit(
        "a key that was replaced",
        f"it goes on for {_time(identity.MAX_GRACE.total_seconds())} at most",
        _api(SpecError),
        "`grace_period` (`--grace`), 0 unless given",
    ),
    Limit("keys of a family that go on", "two", _api(ConflictError)),
    Limit(
        "a key that rotates itself",
        f"once in {_time(identity.SELF_ROTATION.total_seconds())}; administrators any time",
        _api(ConflictError),
    ),
    Limit(
        "a catalog's key while the database cannot be read",
        _time(DEFAULT_KEY_MAX_AGE_S),
        _gateway(CatalogError("away")),
        "`LORAY_KEY_MAX_AGE_S`",
    ),
    Limit(
        "a login at the console",
        f"{_time(identity.LONGEST.total_seconds())}, or {_time(identity.IDLE.total_seconds())} without a request",
        "the console asks for the key again",
    ),
    Limit("logins at the console", f"{identity.MOST:,}", "the one that was not used for longest ends"),
)

TABLES: Mapping[str, tuple[Limit, ...]] = {  # by title
    "Requests to `/v1`": REQUESTS,
    "Structured output": CONSTRAINTS,
    "What a tenant may store": STORED,
    "Files and batches": FILES,
    "Training jobs": JOBS,
    "The catalog's API": CATALOG_API,
    "Keys and logins": KEYS,
}


def page() -> str:
    """All tables."""
    parts = [
        "# Limits\n",
        "What each limit is, what sets it and what lies beyond it. Limits that keys and tenants have of their own are "
        "explained in [access](../guide/access.md#limits-of-requests).\n",
    ]
    for title, limits in TABLES.items():
        parts += [f"## {title}\n", limits_table(limits)]
    return "\n".join(parts)


def limits_table(limits: tuple[Limit, ...]) -> str:
    """The rows as Markdown."""
    rows = [(limit.what, limit.limit, limit.set_by, limit.beyond) for limit in limits]
    return table(("what", "limit", "set by", "beyond it"), rows)

"""What the catalog keeps of Tinker's protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from loray.catalog import Catalog
from loray.errors import ConflictError, LimitExceeded, NotFoundError
from loray.spec import LoraSpec, Principal
from loray.spec.tinker import TinkerCheckpoint, TinkerModel, TinkerSampler, TinkerSession
from tests.fixtures.gateway import adapter_ref

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
SESSION = TinkerSession(
    id="session-1",
    tenant="acme",
    key_id="key-1",
    sdk_version="0.38.0",
    display_name=None,
    metadata={"a": "b"},
    priority=100,
    created_at=NOW,
    seen_at=NOW,
)
MODEL = TinkerModel(
    id="session-1:train:0",
    session_id="session-1",
    tenant="acme",
    base="smollm2",
    base_model="Qwen/Qwen3-8B",
    adapter=LoraSpec(rank=8),
    seed=1 << 40,
    name="spoken",
    metadata={},
    created_at=NOW,
    used_at=NOW,
)
SAMPLER = TinkerSampler(
    id="session-1:sample:0",
    session_id="session-1",
    tenant="acme",
    base="smollm2",
    base_model="smollm2",
    model_id=MODEL.id,
    seq=3,
    inflight=True,
    is_ready=False,
)


def checkpoint(name: str, seq: int, **fields: Any) -> TinkerCheckpoint:
    return TinkerCheckpoint(
        **{"model_id": MODEL.id, "tenant": "acme", "kind": "training", "name": name, "seq": seq, "created_at": NOW}
        | fields
    )


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    opened = Catalog(catalog_url)
    opened.tenants.create("acme")
    yield opened
    opened.close()


@pytest.fixture
def acme(catalog: Catalog) -> Catalog:
    view = catalog.view(Principal(tenant="acme"))
    view.tinker.add_session(SESSION)
    assert view.tinker.add_model(MODEL, 1) == MODEL
    return view


def test_rows_are_read_as_they_were_written(acme: Catalog) -> None:
    ready = replace(SAMPLER, adapter=adapter_ref("d" * 64), holders=("a", "b"), is_ready=True)
    assert acme.tinker.add_sampler(SAMPLER) == SAMPLER
    assert acme.tinker.inflight(MODEL.id) is None
    acme.tinker.finish_sampler(ready)
    assert (acme.tinker.session(SESSION.id), acme.tinker.model(MODEL.id)) == (SESSION, MODEL)
    assert acme.tinker.sampler(SAMPLER.id) == acme.tinker.inflight(MODEL.id) == ready
    assert acme.tinker.add_sampler(SAMPLER) == ready
    assert acme.tinker.join_sampler(SAMPLER.id) == 1
    assert acme.tinker.samplers(SESSION.id) == [replace(ready, num_clients=1)]


def test_each_is_its_own_tenants_alone(catalog: Catalog, acme: Catalog) -> None:
    acme.tinker.add_sampler(SAMPLER)
    acme.tinker.add_checkpoint(checkpoint("a", 1, is_ready=True), overwrite=False)
    tinker = catalog.tinker  # of the default tenant
    for ask in (
        lambda: tinker.session(SESSION.id),
        lambda: tinker.model(MODEL.id),
        lambda: tinker.sampler(SAMPLER.id),
        lambda: tinker.checkpoint(MODEL.id, "training", "a"),
    ):
        with pytest.raises(NotFoundError):
            ask()
    assert tinker.sessions(limit=9) == tinker.models(limit=9) == tinker.checkpoints(limit=9) == ([], 0)
    tinker.delete_checkpoint(MODEL.id, "training", "a")
    assert acme.tinker.checkpoint(MODEL.id, "training", "a").seq == 1


def test_live_models_are_counted(acme: Catalog) -> None:
    other = replace(MODEL, id="session-1:train:1")
    with pytest.raises(LimitExceeded, match="max_jobs"):
        acme.tinker.add_model(other, 1)
    assert acme.tinker.add_model(replace(MODEL, seed=5), 1).seed == MODEL.seed
    acme.tinker.end_model(MODEL.id)
    acme.tinker.add_model(other, 1)
    assert acme.tinker.models(limit=1) == ([other], 2)
    assert acme.tinker.models(limit=9, session_id="session-2") == ([], 0)


def test_progress_is_recorded(catalog: Catalog, acme: Catalog) -> None:
    catalog.tinker.note_progress({MODEL.id: {"step": 3, "tokens": 40, "loss": 1.5}, "gone": {}})
    found = acme.tinker.model(MODEL.id)
    assert (found.num_steps, found.num_tokens, found.loss) == (3, 40, 1.5)
    assert found.used_at > NOW


def test_sessions_are_idle_from_when_they_were_last_seen(catalog: Catalog, acme: Catalog) -> None:
    later = NOW + timedelta(minutes=10)
    assert catalog.tinker.idle_sessions(later) == [SESSION]
    assert catalog.tinker.idle_sessions(later, training_of=SESSION.tenant) == [SESSION]
    assert catalog.tinker.idle_sessions(later, training_of="globex") == []
    catalog.tinker.end_model(MODEL.id)
    assert catalog.tinker.idle_sessions(later, training_of=SESSION.tenant) == []
    catalog.tinker.note_seen({SESSION.id: later})
    assert catalog.tinker.idle_sessions(later) == []
    acme.tinker.end_session(SESSION.id, "success")
    acme.tinker.end_session(SESSION.id, "idle")
    assert acme.tinker.session(SESSION.id).end == "success"
    assert catalog.tinker.idle_sessions(later + timedelta(days=1)) == []


def test_a_name_is_one_requests(acme: Catalog) -> None:
    tinker = acme.tinker
    tinker.add_checkpoint(checkpoint("a", 1), overwrite=False)
    tinker.add_checkpoint(checkpoint("a", 1), overwrite=False)
    assert tinker.saved_by(MODEL.id, 1) == checkpoint("a", 1)
    assert tinker.saved_by(MODEL.id, 2) is None
    with pytest.raises(NotFoundError):
        tinker.checkpoint(MODEL.id, "training", "a")
    with pytest.raises(ConflictError):
        tinker.check_name(MODEL.id, "training", "a", 2)
    done = checkpoint("a", 1, folder="/x", nbytes=5, is_ready=True)
    tinker.finish_checkpoint(done)
    tinker.add_checkpoint(checkpoint("a", 1), overwrite=False)  # sent again after it was written
    assert tinker.checkpoint(MODEL.id, "training", "a") == done
    tinker.add_checkpoint(checkpoint("a", 2), overwrite=True)
    assert tinker.checkpoint(MODEL.id, "training", "a").folder == "/x"
    assert tinker.checkpoints(MODEL.id, limit=9, kind="sampler") == ([], 0)


def test_a_name_is_free_after_a_failure(acme: Catalog) -> None:
    acme.tinker.add_checkpoint(checkpoint("a", 1), overwrite=False)
    acme.tinker.forget_save(MODEL.id, 1)
    done = checkpoint("a", 2, folder="/x", is_ready=True)
    acme.tinker.add_checkpoint(done, overwrite=False)
    acme.tinker.add_checkpoint(checkpoint("a", 3), overwrite=True)
    acme.tinker.forget_save(MODEL.id, 3)
    assert acme.tinker.checkpoint(MODEL.id, "training", "a").folder == "/x"


def test_models_that_their_session_has_left(catalog: Catalog, acme: Catalog) -> None:
    assert (catalog.tinker.left_models(), catalog.tinker.live_bases()) == ([], {"smollm2"})
    acme.tinker.end_session(SESSION.id, "errored")
    assert catalog.tinker.left_models() == [(MODEL, "errored")]
    acme.tinker.end_model(MODEL.id)
    assert (catalog.tinker.left_models(), catalog.tinker.live_bases()) == ([], set())


def test_expired_checkpoints_are_found_whoever_has_them(catalog: Catalog, acme: Catalog) -> None:
    acme.tinker.add_checkpoint(checkpoint("a", 1, is_ready=True), overwrite=False)
    assert catalog.tinker.expired(NOW + timedelta(days=1)) == []
    acme.tinker.set_expiry(MODEL.id, "training", "a", NOW)
    assert [row.name for row in catalog.tinker.expired(NOW)] == ["a"]
    acme.tinker.delete_checkpoint(MODEL.id, "training", "a")
    assert catalog.tinker.expired(NOW) == []


def test_sessions_are_followed_by_their_tenant_and_administrators(catalog: Catalog, acme: Catalog) -> None:
    admin = catalog.view(Principal(scopes=frozenset({"admin"})))
    other = replace(SESSION, id="session-2", tenant="default", created_at=NOW + timedelta(hours=1))
    catalog.tinker.add_session(other)
    acme.tinker.note_progress({MODEL.id: {"step": 7, "tokens": 300, "loss": 2.5}})
    acme.tinker.add_checkpoint(checkpoint("a", 1, is_ready=True), overwrite=False)
    acme.tinker.add_checkpoint(checkpoint("b", 2), overwrite=False)
    keyed = catalog.view(Principal(tenant="acme", scopes=frozenset({"train"})))
    (own,) = keyed.tinker.followed(limit=5)
    assert (own.session, own.num_steps, own.num_tokens, own.num_live) == (SESSION, 7, 300, 1)
    assert [saved.name for saved in own.checkpoints] == ["a"]
    assert [found.session.id for found in admin.tinker.followed(limit=5)] == ["session-2", SESSION.id]
    assert [found.session.id for found in admin.tinker.followed(limit=1, offset=1)] == [SESSION.id]
    stranger = catalog.view(Principal(tenant="globex", scopes=frozenset({"train"})))
    for ask in (stranger.tinker.follow, stranger.tinker.stop_session):
        with pytest.raises(NotFoundError):
            ask(SESSION.id)
    keyed.tinker.stop_session("session-1")
    admin.tinker.stop_session("session-1")
    assert acme.tinker.follow("session-1").session.end == "stopped"


def test_the_front_is_told_which_sessions_were_ended_elsewhere(catalog: Catalog, acme: Catalog) -> None:
    assert catalog.tinker.ended_sessions([SESSION.id]) == []
    acme.tinker.stop_session(SESSION.id)
    assert [found.id for found in catalog.tinker.ended_sessions([SESSION.id, "other"])] == [SESSION.id]
    assert catalog.tinker.ended_sessions([]) == []

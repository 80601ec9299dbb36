"""What models save, and what is left when their clients have gone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import numpy as np

from loray.errors import ClusterError
from loray.spec import Limits, Principal
from serve_apps.tinker.sessions import SESSION_IDLE_S, SOON_IDLE_S, now
from tests.fixtures.tinker import Unigram
from tests.serve_apps.tinker.asking import TOKENS, Client, asking


async def trained(client: Client) -> None:
    await client.begin()
    await client.forward_backward()
    await client.step()


async def test_a_model_goes_on_from_a_checkpoint_with_its_optimizer(front: Unigram) -> None:
    async with asking(front) as client:
        await trained(client)
        path = (await client.done("save_weights", client.next(path="one")))["path"]
        assert path == f"tinker://{client.model}/weights/one"
        body = {"session_id": client.session, "model_seq_id": 1, "path": path, "optimizer": True}
        loaded = await client.done("load_weights", body)
        assert loaded == {"type": "load_weights", "path": path, "model_id": f"{client.session}:train:1"}
        old, new = (front.trainer.models[f"{client.session}:train:{i}"] for i in (0, 1))
        np.testing.assert_array_equal(old.logits, new.logits)
        assert new.step == 1
        info = await client.ask("weights_info", {"tinker_path": path})
        assert (info["base_model"], info["lora_rank"], info["train_unembed"]) == ("base", 8, False)


async def test_a_checkpoint_is_loaded_into_a_model_that_is_there(front: Unigram) -> None:
    async with asking(front) as client:
        await trained(client)
        path = (await client.done("save_weights", client.next(path="one")))["path"]
        await client.forward_backward()
        await client.step()
        changed = front.trainer.models[client.model].logits
        assert (await client.done("load_weights", client.next(path=path, optimizer=False)))["type"] == "load_weights"
        assert not np.array_equal(front.trainer.models[client.model].logits, changed)


async def test_names_are_taken_once_unless_they_are_overwritten(front: Unigram) -> None:
    async with asking(front) as client:
        await trained(client)
        first = client.next(path="one")
        await client.done("save_weights", first)
        assert (await client.done("save_weights", first))["type"] == "save_weights"
        response = await client.post("save_weights", client.next(path="one"))
        assert response.status_code == 400
        client.seq -= 1
        await client.done("save_weights", client.next(path="one", overwrite=True))


async def test_what_was_saved_is_written_down_by_another_front(front: Unigram) -> None:
    """The one that was asked to save has gone before the trainer was done."""

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    async with asking(front) as client:
        await trained(client)
        answered = front.trainer.result
        front.trainer.result = never  # type: ignore[method-assign, assignment]
        request = await client.ask("save_weights", client.next(path="one"))
        front.front.futures.close()
        front.trainer.result = answered  # type: ignore[method-assign]
    rows = front.catalog.view(Principal(tenant="acme")).tinker
    assert rows.checkpoints(limit=9) == ([], 0)
    async with asking(front.restarted()) as client:
        path = f"tinker://{request['model_id']}/weights/one"
        assert (await client.result(request)).json() == {"type": "save_weights", "path": path}
        (saved,), _ = rows.checkpoints(limit=9)
        assert saved.folder in front.trainer.folders
        step = await client.result({"request_id": f"{request['model_id']}#2"})
        assert step.json()["type"] == "optim_step"
        rows.delete_checkpoint(request["model_id"], "training", "one")
    async with asking(front.restarted()) as client:
        gone = await client.result(request)
        assert (gone.status_code, "not there any more" in gone.json()["detail"]) == (404, True)


async def test_sampler_weights_are_the_next_version_of_a_name(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin(user_metadata={"loray.name": "spoken"})
        paths = []
        for name in ("a", "b"):
            await client.forward_backward()
            await client.step()
            paths.append((await client.done("save_weights_for_sampler", client.next(path=name)))["path"])
        versions = front.catalog.view(Principal(tenant="acme")).adapters.get("spoken").versions
        assert set(versions) == {1, 2}
        made = await client.ask(
            "create_sampling_session",
            {"session_id": client.session, "sampling_session_seq_id": 0, "model_path": paths[1]},
        )
        await client.sample(made["sampling_session_id"], sampling_params={"max_tokens": 2})
        call = front.gateways.calls[-1]
        assert call.adapter is not None
        assert (call.adapter.digest, call.tenant, call.priority) == (versions[2].digest, "acme", 100)


async def test_checkpoints_are_listed_given_an_end_and_deleted(front: Unigram) -> None:
    async with asking(front) as client:
        await trained(client)
        await client.done("save_weights", client.next(path="one", ttl_seconds=3600))
        await client.done("save_weights_for_sampler", client.next(path="two"))
        runs = (await client.http.get("/api/v1/training_runs")).json()
        assert runs["cursor"]["total_count"] == 1
        assert runs["training_runs"][0]["last_checkpoint"]["checkpoint_id"] == "weights/one"
        assert runs["training_runs"][0]["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/two"
        of_run = f"/api/v1/training_runs/{client.model}"
        assert (await client.http.get(of_run)).json()["training_run_id"] == client.model
        listed = (await client.http.get(f"{of_run}/checkpoints")).json()["checkpoints"]
        assert {row["checkpoint_type"] for row in listed} == {"training", "sampler"}
        url = f"{of_run}/checkpoints/weights/one"
        ttl = await client.http.put(f"{url}/ttl", json={"ttl_seconds": None})
        assert ttl.status_code == 200
        assert (await client.http.delete(url)).status_code == 200
        assert front.trainer.folders == {}
        assert (await client.http.delete(url)).status_code == 404
        assert (await client.http.delete(f"{of_run}/checkpoints/sampler_weights/two")).status_code == 200
        assert (await client.http.get("/api/v1/checkpoints")).json()["checkpoints"] == []


async def test_checkpoints_count_as_stored_bytes(front: Unigram) -> None:
    scopes = frozenset({"train"})
    own = Principal(tenant="acme", key_id="key-1", scopes=scopes, limits=Limits(max_stored_bytes=2000))
    async with asking(front, own) as client:
        await trained(client)
        await client.done("save_weights", client.next(path="one"))
        response = await client.post("save_weights", client.next(path="two"))
        assert response.status_code == 403


async def test_what_is_over_is_deleted(front: Unigram) -> None:
    async with asking(front) as client:
        await trained(client)
        await client.done("save_weights", client.next(path="one", ttl_seconds=3600))
        rows = front.catalog.view(Principal(tenant="acme")).tinker
        rows.set_expiry(client.model, "training", "one", now() - timedelta(seconds=1))
        await front.front.look()
        assert rows.checkpoints(limit=10) == ([], 0)


async def test_an_idle_session_is_saved_and_gives_back_its_slots(front: Unigram) -> None:
    async with asking(front) as client:
        await trained(client)
        made = await client.done("save_weights_for_sampler", client.next(sampling_session_seq_id=0))
        ahead = now() + timedelta(seconds=SESSION_IDLE_S + 1)
        front.front.sessions.clock = lambda: ahead
        await front.front.look()
        assert front.trainer.models == {}
        assert len(front.gateways.retired) == 1
        heartbeat = await client.post("session_heartbeat", {"session_id": client.session})
        assert heartbeat.status_code == 410
        response = await client.post("optim_step", client.next(adam_params={}))
        assert response.status_code == 400
        assert f"tinker://{client.model}/weights/autosave-1" in response.json()["detail"]
        body = {
            "sampling_session_id": made["sampling_session_id"],
            "seq_id": 1,
            "prompt": {"chunks": [{"tokens": TOKENS}]},
        }
        assert (await client.post("asample", body)).status_code == 400


async def test_models_of_clients_that_have_gone_make_room_for_another(front: Unigram) -> None:
    """A script that ends without a word leaves its session behind, and the next one is not refused for it."""
    own = Principal(tenant="acme", key_id="key-1", limits=Limits(max_jobs=2))
    async with asking(front, own) as gone, asking(front, own) as here, asking(front, own) as another:
        await trained(gone)
        await here.begin()
        await another.open()
        body = {"session_id": another.session, "model_seq_id": 0, "base_model": "base"}
        assert (await another.post("create_model", body)).status_code == 403
        ahead = now() + timedelta(seconds=SOON_IDLE_S + 1)
        front.front.sessions.clock = lambda: ahead
        for client in (here, another):
            await client.post("session_heartbeat", {"session_id": client.session})
        await another.done("create_model", body)
        assert set(front.trainer.models) == {here.model, f"{another.session}:train:0"}
        rows = front.catalog.view(Principal(tenant="acme")).tinker
        assert [row.name for row in rows.checkpoints(limit=9)[0]] == ["autosave-1"]
        assert (await gone.post("session_heartbeat", {"session_id": gone.session})).status_code == 410
        body["model_seq_id"] = 1
        assert (await another.post("create_model", body)).status_code == 403


async def test_a_front_that_begins_waits_for_heartbeats_before_it_ends_a_session(front: Unigram) -> None:
    own = Principal(tenant="acme", key_id="key-1", limits=Limits(max_jobs=1))
    async with asking(front, own) as client:
        await trained(client)
    long_ago = {client.session: now() - timedelta(seconds=SESSION_IDLE_S + 1)}
    front.catalog.tinker.note_seen(long_ago)
    later = front.restarted()
    async with asking(later, own) as another:
        await another.open()
        await later.front.look()
        body = {"session_id": another.session, "model_seq_id": 0, "base_model": "base"}
        assert (await another.post("create_model", body)).status_code == 403
        assert list(front.trainer.models) == [client.model]


async def test_a_slot_that_could_not_be_given_back_is_tried_again(front: Unigram) -> None:
    async def away(_: str) -> None:
        raise ClusterError("the trainer is away")

    remove = front.trainer.remove
    async with asking(front) as client:
        await trained(client)
        front.trainer.remove = away  # type: ignore[method-assign, assignment]
        await client.post(f"sessions/{client.session}/finish", {"reason": {"type": "errored"}})
        assert len(front.trainer.models) == 1
        front.trainer.remove = remove  # type: ignore[method-assign]
        await front.front.look()
        assert front.trainer.models == {}
        rows = front.catalog.view(Principal(tenant="acme")).tinker
        assert [row.name for row in rows.checkpoints(limit=9)[0]] == ["autosave-1"]


async def test_a_session_that_is_heard_of_goes_on(front: Unigram) -> None:
    async with asking(front) as client:
        await trained(client)
        ahead = now() + timedelta(seconds=SESSION_IDLE_S + 1)
        front.front.sessions.clock = lambda: ahead
        assert (await client.post("session_heartbeat", {"session_id": client.session})).status_code == 200
        await front.front.look()
        await front.restarted().front.look()
        assert list(front.trainer.models) == [client.model]
        assert front.catalog.view(Principal(tenant="acme")).tinker.model(client.model).num_steps == 1


async def test_a_session_that_its_client_finishes_ends(front: Unigram) -> None:
    async with asking(front) as client:
        await trained(client)
        body = {"reason": {"type": "success"}, "detail": None}
        assert (await client.post(f"sessions/{client.session}/finish", body)).status_code == 200
        assert front.trainer.models == {}
        rows = front.catalog.view(Principal(tenant="acme")).tinker
        assert (rows.session(client.session).end, rows.checkpoints(limit=9)) == ("success", ([], 0))
        assert replace(rows.model(client.model)).is_live is False


async def test_a_session_that_was_stopped_in_the_console_is_saved_and_its_client_told(front: Unigram) -> None:
    async with asking(front) as client:
        await client.begin()
        await client.forward_backward()
        await client.step()
        front.catalog.view(Principal(tenant="acme")).tinker.stop_session(client.session)
        assert (await client.post("session_heartbeat", {"session_id": client.session})).status_code == 200
        await front.front.look()
        assert front.trainer.models == {}
        assert (await client.post("session_heartbeat", {"session_id": client.session})).status_code == 410
        saved = (await client.http.get("/api/v1/checkpoints")).json()["checkpoints"]
        assert [one["checkpoint_id"] for one in saved] == ["weights/autosave-1"]
        await front.front.look()

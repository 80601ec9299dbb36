"""Queues, results and restarts of a trainer, in this process."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.runs.folders import RunFolder
from jobs.runs.journals import FileLog
from jobs.trainer import actor as actor_module
from jobs.trainer.actor import Trainer
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import get_base
from loray.errors import (
    AdapterGone,
    ConflictError,
    NotFoundError,
    Overloaded,
    RequestError,
    SpecError,
    UnsupportedError,
)
from loray.spec.datums import (
    AdamParams,
    Datum,
    ForwardBackward,
    LoadState,
    LossOutput,
    OptimStep,
    Publish,
    SaveState,
    TokenLoss,
)
from loray.train.checkpoint import read_optimizer
from tests.fixtures.s3 import S3Server
from tests.jobs.trainer.conftest import SPECS, datum, running

WAIT_S = 60.0
ADAM = AdamParams(learning_rate=1e-2)


class Always:
    """A clock by which a snapshot is always due, or never."""

    def __init__(self, is_due: bool) -> None:
        self.is_due = is_due

    def taken(self) -> None: ...
    def accepted(self, nbytes: int) -> None: ...
    def computed(self, seconds: float) -> None: ...


def learn(model: str, seed: int, **fields: Any) -> ForwardBackward:
    return ForwardBackward(model, (datum(seed), datum(seed + 100, 5)), **fields)


async def steps(trainer: Trainer, model: str, numbers: range, first_seq: int = 1) -> list[float]:
    """Sends passes and steps, all at once, and returns the losses."""
    for n in numbers:
        seq = first_seq + 2 * (n - numbers[0])
        await trainer.submit(model, seq, learn(model, n))
        await trainer.submit(model, seq + 1, OptimStep(model, ADAM))
    found = []
    for n in numbers:
        seq = first_seq + 2 * (n - numbers[0])
        output, metrics = [await trainer.result(model, s, WAIT_S) for s in (seq, seq + 1)]
        assert isinstance(output, LossOutput)
        assert isinstance(metrics, Mapping)
        found.append(output.loss)
    return found


def masters(trainer: Trainer, model: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer._trainer.bank.masters(model).items()}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_operations_are_done_in_their_order_whatever_order_they_come_in(home: Path) -> None:
    async def run() -> None:
        async with running() as trainer:
            await trainer.create("one", SPECS["one"], 0)
            await trainer.create("two", SPECS["two"], 1)
            wanted = await steps(trainer, "two", range(3))
            ops = [op for n in range(3) for op in (learn("one", n), OptimStep("one", ADAM))]
            for seq in (6, 2, 3, 5, 2, 4):
                await trainer.submit("one", seq, ops[seq - 1])
            assert await trainer.result("one", 2, 0.05) is None
            assert (await trainer.status())["models"]["one"]["queued"] == 5
            await trainer.submit("one", 1, ops[0])
            losses = []
            for seq in (1, 3, 5):
                output = await trainer.result("one", seq, WAIT_S)
                losses.append(output.loss)
            assert losses != wanted
            for seq, op in enumerate(ops, 1):  # all of it again: nothing happens
                await trainer.submit("one", seq, op)
            assert (await trainer.result("one", 6, WAIT_S))["num_updates"] == 3.0
            with pytest.raises(ConflictError, match="operation 4 of one was another one"):
                await trainer.submit("one", 4, learn("one", 7))
            again = await trainer.result("one", 1, WAIT_S)  # until a while after it was fetched
            assert again.loss == losses[0]
            found = (await trainer.status())["models"]["one"]
            assert (found["step"], found["seq"], found["queued"], found["tokens"]) == (3, 7, 0, 3 * 14)
            with pytest.raises(SpecError, match="numbers begin at 1"):
                await trainer.submit("one", 0, ops[0])
            with pytest.raises(NotFoundError, match="no model 'three'"):
                await trainer.submit("three", 1, learn("three", 0))

    asyncio.run(run())


def test_heads_of_all_queues_share_passes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running() as trainer:
            calls: list[list[str]] = []
            compute = trainer._trainer.forward_backward
            monkeypatch.setattr(
                trainer._trainer,
                "forward_backward",
                lambda ops: (calls.append([op.model for op in ops]), compute(ops))[1],
            )
            for seed, name in enumerate(SPECS):
                await trainer.create(name, SPECS[name], seed)
            async with trainer._changing:  # the trainer is at work on something
                for name, n in itertools.product(SPECS, range(2)):
                    await trainer.submit(name, 3 * n + 1, learn(name, n))
                    await trainer.submit(name, 3 * n + 2, learn(name, n + 10, loss=TokenLoss(divisor=2.0)))
                    await trainer.submit(name, 3 * n + 3, OptimStep(name, ADAM))
            for name in SPECS:
                assert await trainer.result(name, 6, WAIT_S) is not None
            together = sorted([name for name in SPECS for _ in range(2)])
            assert [sorted(call) for call in calls] == [together, together]

    asyncio.run(run())


def test_a_failed_operation_has_its_number(home: Path) -> None:
    async def run() -> None:
        async with running() as trainer:
            await trainer.create("one", SPECS["one"], 0)
            await trainer.create("two", SPECS["one"], 0)
            bad = ForwardBackward("one", (Datum([1], [999]),))
            await trainer.submit("one", 1, bad)
            await trainer.submit("one", 2, LoadState("one", "/nowhere", True))
            wanted = await steps(trainer, "two", range(2))
            assert await steps(trainer, "one", range(2), first_seq=3) == wanted
            with pytest.raises(RequestError, match="datum 0 has the target 999"):
                await trainer.result("one", 1, WAIT_S)
            with pytest.raises(SpecError, match="no saved state"):
                await trainer.result("one", 2, WAIT_S)

    asyncio.run(run())


@pytest.mark.parametrize("is_due", [False, True])
def test_a_trainer_that_was_killed_goes_on(home: Path, is_due: bool) -> None:
    """From its journal alone, and from snapshots; results that nobody had fetched are there."""

    async def run() -> None:
        async with running() as trainer:
            await trainer.create("whole", SPECS["one"], 3)
            wanted = await steps(trainer, "whole", range(6))
            states = masters(trainer, "whole")
            await trainer.remove("whole")  # in the company of another's passes, the last bits may be others
        async with running() as trainer:
            trainer._clock = Always(is_due)
            await trainer.create("one", SPECS["one"], 3)
            ours = await steps(trainer, "one", range(2))
            await trainer.submit("one", 5, learn("one", 2))
            while trainer._models["one"].next_seq < 6:
                await asyncio.sleep(0.001)
            async with trainer._changing:  # after the snapshot
                pass
        async with running() as trainer:  # a gradient that no step has used
            assert trainer._models["one"].next_seq == (6 if is_due else 1)
            output = await trainer.result("one", 5, WAIT_S)
            await trainer.submit("one", 5, learn("one", 2))
            await trainer.submit("one", 6, OptimStep("one", ADAM))
            await trainer.submit("one", 7, learn("one", 3))
        async with running() as trainer:  # nothing of it may have been done
            with pytest.raises(ConflictError):
                await trainer.submit("one", 7, learn("one", 4))
            last = await trainer.result("one", 7, WAIT_S)
            await trainer.submit("one", 8, OptimStep("one", ADAM))
            rest = await steps(trainer, "one", range(4, 6), first_seq=9)
            assert [*ours, output.loss, last.loss, *rest] == wanted
            assert equal(masters(trainer, "one"), states)
            assert (await trainer.status())["models"]["one"]["step"] == 6

    asyncio.run(run())


class Killed(BaseException):
    """The process has ended."""


def killed_at(patched: pytest.MonkeyPatch, number: int) -> None:
    """The process ends instead of its write of this number; 0: it never does."""
    count = itertools.count(1)

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def either(*arguments: Any) -> Any:
            if next(count) == number:
                raise Killed
            return write(*arguments)

        return either

    for owner, name in ((RunFolder, "write"), (RunFolder, "remove"), (FileLog, "append"), (FileLog, "keep")):
        patched.setattr(owner, name, dying(getattr(owner, name)))


async def result_or_end(trainer: Trainer, model: str, seq: int) -> object:
    """Waits for a result, or for the end of the trainer's loop, and raises that."""
    asking = asyncio.ensure_future(trainer.result(model, seq, WAIT_S))
    assert trainer._task is not None
    await asyncio.wait({asking, trainer._task}, return_when=asyncio.FIRST_COMPLETED)
    if trainer._task.done():
        asking.cancel()
        trainer._task.result()
    return await asking


def test_models_killed_at_any_write_are_those_that_were_not(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends again what had no answer. 8 steps are 8 steps, and losses have their bits."""

    async def run() -> None:
        async with running() as trainer:
            await trainer.create("whole", SPECS["vera"], 3)
            wanted = await steps(trainer, "whole", range(8))
            await trainer.remove("whole")
        chance = random.Random(5)
        kills = [chance.randrange(1, 14) for _ in range(12)]
        sent, losses = 1, dict[int, float]()
        while True:
            async with running() as trainer:
                with monkeypatch.context() as patched:
                    trainer._clock = Always(chance.random() < 0.5)  # type: ignore[assignment]
                    killed_at(patched, kills.pop() if kills else 0)
                    try:
                        await trainer.create("one", SPECS["vera"], 3)
                        while sent <= 16:
                            n = (sent - 1) // 2
                            await trainer.submit("one", sent, learn("one", n) if sent % 2 else OptimStep("one", ADAM))
                            result = await result_or_end(trainer, "one", sent)
                            if isinstance(result, LossOutput):
                                losses[n] = result.loss
                            sent += 1
                    except Killed:
                        continue
                    assert (await trainer.status())["models"]["one"]["step"] == 8
                    break
        assert [losses[n] for n in range(8)] == wanted

    asyncio.run(run())


def test_idle_models_leave_the_bank_and_come_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running() as trainer:
            await trainer.create("one", SPECS["one"], 0)
            await trainer.create("two", SPECS["two"], 0)
            await steps(trainer, "one", range(2))
            before = masters(trainer, "one")
            needed = trainer._bytes(trainer._models["one"].record.adapter)
            trainer._room = needed + 1
            with pytest.raises(Overloaded, match="ask again"):
                await trainer.create("three", SPECS["one"], 0)
            for model in trainer._models.values():
                model.used_at -= 61.0
            await trainer.create("three", SPECS["one"], 0)
            resident = {name: model["resident"] for name, model in (await trainer.status())["models"].items()}
            assert resident == {"one": False, "two": False, "three": True}
            await trainer.submit("one", 5, learn("one", 2))
            assert await trainer.result("one", 5, 0.05) is None
            trainer._models["three"].used_at -= 61.0
            trainer._wake.set()
            assert await trainer.result("one", 5, WAIT_S) is not None
            assert equal(masters(trainer, "one"), before)
            for model in trainer._models.values():
                model.used_at -= 601.0
            ended: list[bool] = []
            monkeypatch.setattr(actor_module, "_end", lambda: ended.append(True))
            async with trainer._changing:
                await trainer._look_after()
                assert not any(model.resident for model in trainer._models.values())
                assert not ended
                trainer._used_at -= 601.0
                await trainer._look_after()
            assert ended
        async with running() as trainer:
            assert sorted(trainer._models) == ["one", "three", "two"]

    asyncio.run(run())


def test_states_are_saved_and_loaded(home: Path) -> None:
    async def run() -> None:
        async with running() as trainer:
            await trainer.create("one", SPECS["one"], 0)
            await steps(trainer, "one", range(2))
            await trainer.submit("one", 5, SaveState("one", "two/steps"))
            saved = await trainer.result("one", 5, WAIT_S)
            folder = Path(saved["folder"])
            assert saved == {
                "folder": str(folder),
                "step": 2,
                "nbytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
            }
            before = masters(trainer, "one")
            assert equal(read_optimizer(folder).masters, before)
            weights = read_adapter(folder / "adapter", get_base(home, "tiny").config)
            assert len(weights.modules) == 14
            wanted = await steps(trainer, "one", range(2, 4), first_seq=6)
            await trainer.submit("one", 10, LoadState("one", saved["folder"], True))
            assert await steps(trainer, "one", range(2, 4), first_seq=11) == wanted
            await trainer.load("one", saved["folder"], False)
            assert equal(masters(trainer, "one"), before)
            assert trainer._trainer.state("one")[0].num_updates == 0
            made = await trainer.create("again", SPECS["one"], 0, saved["folder"])
            assert made == {"model": "again", "step": 0, "next_seq": 1, "dtype": "float32"}
            assert equal(masters(trainer, "again"), before)
            with pytest.raises(SpecError, match="adapter of another form"):
                await trainer.create("other", SPECS["two"], 0, saved["folder"])
            assert await trainer.save("one", "two/steps") == saved["folder"]
            assert Path(await trainer.save("one", "..")).parent == folder.parent
            with pytest.raises(SpecError, match="empty"):
                await trainer.save("one", "")
            for path in ("/etc", f"{folder}/../../..", str(folder.parent)):
                with pytest.raises(SpecError, match="saved state"):
                    await trainer.load("one", path, True)
            await trainer.delete(str(folder.parent / "%2E%2E"))
            assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
            await trainer.remove("one")
            await trainer.remove("one")
            assert folder.is_dir()
        async with running() as trainer:  # its beginning is in its own folder
            assert sorted(trainer._models) == ["again"]
            await trainer.submit("again", 1, learn("again", 2))
            await trainer.result("again", 1, WAIT_S)
            assert equal(masters(trainer, "again"), before)

    asyncio.run(run())


def test_versions_are_published_given_and_retired(home: Path) -> None:
    async def run() -> None:
        async with running() as trainer:
            await trainer.create("one", SPECS["one"], 0)
            await trainer.submit("one", 1, Publish("one"))
            first, holder = await trainer.result("one", 1, WAIT_S)
            assert (first.name, first.version, first.holders, holder) == ("~one", 0, (holder,), "loray-trainer-tiny")
            again, _ = await trainer.publish("one")
            assert again.digest == first.digest
            refs = []
            for n in range(3):
                await steps(trainer, "one", range(n, n + 1), first_seq=2 + 2 * n)
                refs.append((await trainer.publish("one", "ephemeral", 2))[0])
            assert [ref.version for ref in refs] == [1, 2, 3]
            for gone in (first, refs[0]):
                with pytest.raises(AdapterGone, match="publish the model again"):
                    await trainer.give(gone.digest)
            cached = {path.name for path in (home / "cache" / "adapters").iterdir()}
            assert cached == {ref.digest for ref in refs[1:]}
            files = await trainer.give(refs[2].digest)
            await trainer.retire([refs[1].digest])
            with pytest.raises(AdapterGone):
                await trainer.give(refs[1].digest)
            weights = masters(trainer, "one")
            await trainer.create("two", SPECS["two"], 0)
            for n in range(6):
                await steps(trainer, "two", range(n, n + 1), first_seq=1 + 3 * n)
                await trainer.submit("two", 3 + 3 * n, Publish("two"))
            found = [await trainer.result("two", 3 + 3 * n, WAIT_S) for n in range(6)]
            assert len({ref.digest for ref, _ in found}) == 6
            for ref, _ in found:  # those that its queue has published stay, in the node's cache at least
                assert sorted(await trainer.give(ref.digest)) == sorted(files)
            assert len(trainer._versions._files) == 4 + 1
            await trainer.remove("two")
            with pytest.raises(AdapterGone):
                await trainer.give(found[-1][0].digest)
        folder = home / "given"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        read = read_adapter(folder, get_base(home, "tiny").config)
        assert sum(t.numel() for m in read.modules.values() for t in m.parts.values()) == sum(
            t.numel() for t in weights.values()
        )
        async with running() as trainer:
            assert await trainer.give(refs[2].digest) == files  # from the node's cache
            begun = await trainer.create("next", SPECS["one"], 0, refs[2].digest)
            assert begun["step"] == 0
            assert equal(masters(trainer, "next"), weights)

    asyncio.run(run())


@pytest.mark.slow
def test_all_of_it_in_a_bucket(home: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAY_STORE", s3_server.url(prefix="loray"))

    async def run() -> None:
        async with running() as trainer:
            await trainer.create("whole:1", SPECS["one"], 3)
            wanted = await steps(trainer, "whole:1", range(4))
            await trainer.remove("whole:1")
            await trainer.create("one:1", SPECS["one"], 3)
            ours = await steps(trainer, "one:1", range(2))
            saved = await trainer.save("one:1", "half")
            assert saved.startswith("s3://")
        async with running() as trainer:  # from the journal
            assert sorted(trainer._models) == ["one:1"]
            trainer._clock = Always(True)  # type: ignore[assignment]
            ours += await steps(trainer, "one:1", range(2, 3), first_seq=5)
            await trainer.load("one:1", saved, True)
        async with running() as trainer:  # from the snapshot
            assert await steps(trainer, "one:1", range(2, 4), first_seq=7) == wanted[2:]
            assert ours == wanted[:3]
            await trainer.create("next", SPECS["one"], 0, saved)
            await trainer.delete(saved)
            with pytest.raises(SpecError, match="no saved state"):
                await trainer.load("next", saved, False)

    asyncio.run(run())


def test_a_model_whose_record_is_damaged_is_left_as_it_is(home: Path) -> None:
    async def run() -> None:
        async with running() as trainer:
            for name in ("one", "two"):
                await trainer.create(name, SPECS["one"], 0)
        (record,) = (home / "trainers" / "tiny" / "models" / "one").glob("model.json")
        record.write_text("{")
        (home / "trainers" / "tiny" / "models" / "two" / "model.json").unlink()  # it was being created
        async with running() as trainer:
            status = await trainer.status()
            assert status["models"] == {}
            (why,) = status["unreadable"]
            assert why.startswith("one: ")
        assert [path.name for path in record.parent.parent.iterdir()] == ["one"]

    asyncio.run(run())


def test_what_cannot_be_created_says_why(home: Path) -> None:
    async def run() -> None:
        async with running() as trainer:
            await trainer.create("one", SPECS["one"], 0)
            await trainer.create("one", SPECS["one"], 0)
            with pytest.raises(ConflictError, match="another kind"):
                await trainer.create("one", SPECS["two"], 0)
            with pytest.raises(SpecError, match="not valid"):
                await trainer.create("two", {"method": "lora", "rank": 0}, 0)
            with pytest.raises(UnsupportedError, match="alone"):
                await trainer.create("two", {"method": "ia3"}, 0)
            assert sorted((await trainer.status())["models"]) == ["one"]

    asyncio.run(run())

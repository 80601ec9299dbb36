"""Commands as bytes: they come back as they were, and nothing that is no command becomes anything."""

from __future__ import annotations

import pickle
import random
import re
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from torch import Tensor

import loray.engine
from loray.bases.registry import BaseModel
from loray.engine.memory.adapter_layout import AdapterShape, LayerGroup, Matrix
from loray.engine.memory.blocks import BlockKind, Extent
from loray.engine.parallel import pool as of
from loray.engine.parallel.pool import CODEC
from loray.engine.parallel.transport import WireError
from loray.engine.parallel.worker import ARGUMENTS, WorkerArgs
from loray.engine.pool.packed import PackedAdapter
from loray.engine.pool.pool import AdapterDescriptor, Allocation
from loray.methods.weights import SharedProjection
from loray.spec import AdapterRef, RopeParameters, ServeSpec
from loray_kernels import CaptureLimits, Parts

NUM_MUTATED = 20_000
REF = AdapterRef("d" * 64, "tone", 3, "longlora", "b" * 64, 64, 1 << 40, "hermes", None)
SHAPE = AdapterShape(
    (LayerGroup((0, 1), (Matrix("q_proj", "lora_a", 4, 64), Matrix("q_proj", "lora_b", 4, 64, 0.5))),),
    (Matrix("norm", "norm", 1, 64),),
)
ROPE = RopeParameters(rope_type="linear", rope_theta=1e4, factor=2)
EXTENT = Extent(BlockKind.LAYERED, 3, 0, 64, 4)
COMMANDS: list[Any] = [
    of.Forward(b"\x00\xff", ("d", "e")),
    of.Replay(b""),
    of.MoveBlocks({1: 2, 3: 4}),
    of.RemoveAdapter("d"),
    of.GetPoolMap(),
    of.UseCaptures(8, 512),
    of.CompileAdapters(),
    of.CaptureSteps(CaptureLimits(60.0, 1 << 30)),
    {"d": of.AdapterPlace((EXTENT,), SHAPE, None, AdapterDescriptor(1, 2, Parts.LORA | Parts.OWN, None, 0, 7))},
    [b"one", b"two"],
]


def placing() -> of.PlaceAdapter:
    pair = SharedProjection(torch.arange(6.0).view(2, 3), torch.zeros(0, 4), "p")
    packed = PackedAdapter(SHAPE, (torch.ones(2, 8, dtype=torch.bfloat16),), torch.ones(64), (5, 6), pair, ROPE)
    return of.PlaceAdapter(REF, packed, Allocation((EXTENT,), 5))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_a_command_comes_back_as_it_was(command: Any) -> None:
    back = CODEC.loads(CODEC.dumps(command).data)
    assert back == command
    assert type(back) is type(command)


def test_rows_follow_the_bytes_and_nothing_else_has_tensors() -> None:
    command = placing()
    with pytest.raises(AssertionError, match="not rows of adapters"):
        CODEC.dumps(command)
    apart = CODEC.dumps(command, rows_apart=True)
    assert all(rows.is_contiguous() for rows in apart.rows)
    following, asked = iter(apart.rows), []

    def receive(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        asked.append((dtype, shape))
        return next(following)

    back = CODEC.loads(apart.data, receive)
    assert asked == [(t.dtype, tuple(t.shape)) for t in apart.rows]
    assert (back.ref, back.allocation) == (REF, Allocation((EXTENT,), 5))
    packed: PackedAdapter = back.packed
    assert (packed.shape, packed.token_ids, packed.rope) == (SHAPE, (5, 6), ROPE)
    assert packed.pair is not None
    assert torch.equal(packed.pair.a_RI, torch.arange(6.0).view(2, 3))
    with pytest.raises(WireError, match="a tensor where none is expected"):
        CODEC.loads(apart.data)


def test_a_process_gets_its_arguments(base: BaseModel) -> None:
    spec = ServeSpec(base=base.name, device="cpu", pool_bytes=1 << 20, num_threads=1, dtype="float32", max_model_len=99)
    given = WorkerArgs(spec, 1, "127.0.0.1", 4321, bytes(range(32))), base
    assert ARGUMENTS.loads(ARGUMENTS.dumps(given).data) == given


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it ran",)


NO_COMMANDS: list[Any] = [{"a": 1}, [], [99], [-1], [True, 1], [[1], 1], [5, b"only one field"], [3, 0, -1], [3, 99, 1]]
NO_COMMANDS += [[2, 1], [4, 1], [2, [1], 2], msgpack.ExtType(1, b"x")]  # a list as key
NO_MESSAGES = [pickle.dumps(Evil()), b"", b"\x91" * 600 + b"\x00", b"\xdd\xff\xff\xff\xff"]  # a list of 2**32 - 1 items


@pytest.mark.parametrize("message", [*NO_MESSAGES, *map(msgpack.packb, NO_COMMANDS)])
def test_what_is_no_message_becomes_nothing(message: bytes) -> None:
    with pytest.raises(WireError):
        CODEC.loads(message, lambda dtype, shape: torch.empty(0))


def test_messages_that_were_changed_on_their_way_raise_nothing_else() -> None:
    draw = random.Random(0)
    sent = [CODEC.dumps(command).data for command in COMMANDS] + [CODEC.dumps(placing(), rows_apart=True).data]
    num_refused = 0
    for _ in range(NUM_MUTATED):
        message = bytearray(draw.choice(sent))
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(message) + 1)
            if draw.random() < 0.3:
                del message[at : at + draw.randint(1, 8)]
            else:
                message[at : at + draw.randint(0, 1)] = bytes([draw.randrange(256)])
        try:
            CODEC.loads(bytes(message), lambda dtype, shape: torch.empty(0))
        except WireError:
            num_refused += 1
    assert num_refused > NUM_MUTATED / 4


def test_no_module_of_the_engine_imports_pickle() -> None:
    (folder,) = map(Path, loray.engine.__path__)
    found = [p for p in folder.rglob("*.py") if re.search(r"^\s*(import|from) pickle", p.read_text(), re.MULTILINE)]
    assert found == []

"""Commands and decode steps as bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loray.engine.parallel import wire
from loray_kernels import DecodeStep, Parts

CPU = torch.device("cpu")


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def no_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    raise AssertionError("no tensor follows the bytes")


def test_a_step_comes_back_as_it_was() -> None:
    plain = DecodeStep(numbers(5, 6), numbers(0, 9), numbers(1, 0), numbers())
    own = plain._replace(
        items=numbers(40, 0, 1),
        places=[3, 4],
        blocks=[70, 80],
        parts=Parts.LORA | Parts.OWN,
        vectors=numbers(0, 44),
        pairs=numbers(7, 1, 1),
        own_rows=numbers(-1, 1 << 40),
    )
    for step in (plain, own):
        back = wire.load_step(wire.dump_step(step))
        assert back.parts is step.parts
        for name in DecodeStep._fields:
            assert list(np.atleast_1d(getattr(back, name))) == list(np.atleast_1d(getattr(step, name))), name


def test_tensors_stand_in_the_bytes_and_rows_follow_them() -> None:
    tensors = (torch.arange(6.0).view(2, 3).T, torch.zeros(0, 4), torch.ones(2, dtype=torch.bfloat16))
    inside = wire.dumps(("step", tensors))
    assert inside.rows == ()
    name, back = wire.loads(inside.data, CPU, {}, {}, no_rows)
    assert name == "step"
    assert all(map(torch.equal, back, tensors))
    apart = wire.dumps(("rows", tensors), rows_apart=True)
    assert all(rows.is_contiguous() for rows in apart.rows)
    following, asked = iter(apart.rows), []

    def receive(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        asked.append((dtype, shape))
        return next(following)

    _, back = wire.loads(apart.data, CPU, {}, {}, receive)
    assert asked == [(t.dtype, tuple(t.shape)) for t in tensors]
    assert all(map(torch.equal, back, tensors))

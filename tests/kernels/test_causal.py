"""Causal attention of segments, forward and backward, against its definition in fp64.

Shapes: F segments, R query heads of a key-value head, L positions, D head width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray_kernels import BackendUnavailable
from loray_kernels.cpu import causal
from loray_kernels.cpu.build import supported
from tests.kernels import emulated

# one position, a block and a bit, several blocks, more than a strip of the forward pass
SHAPES = [(2, 3, 1, 16), (1, 2, 65, 64), (3, 1, 200, 80), (1, 3, 1100, 32)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=["torch", "cpu", pytest.param(emulated.ISA, marks=pytest.mark.slow)])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel that `causal_forward` takes, whatever the dtype."""
    name = str(request.param)
    try:
        if name == emulated.ISA:
            emulated.provide()
        elif name == "cpu":
            name = supported()[-1]
    except BackendUnavailable as e:
        pytest.skip(str(e))
    monkeypatch.setattr(causal, "_isa_for", lambda q_FRLD: None if name == "torch" else name)
    return name


def inputs(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the result."""
    generator = torch.Generator().manual_seed(sum(shape))
    num, repeats, length, width = shape
    q, dout = (torch.randn(num, repeats, length, width, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(num, length, width, generator=generator).to(dtype) for _ in range(2))
    return q, k, v, dout


def definition(q_FRLD: Tensor, k_FLD: Tensor, v_FLD: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("frld,fmd->frlm", q_FRLD, k_FLD) * q_FRLD.shape[-1] ** -0.5
    length = q_FRLD.shape[2]
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    return torch.einsum("frlm,fmd->frld", scores.softmax(-1), v_FLD), scores.logsumexp(-1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    q, k, v, dout = inputs(dtype, shape)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want_out, want_lse = definition(*exact)
    want_out.backward(dout.double())
    out, lse = causal.causal_forward(q, k, v, None)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    grads = causal.causal_backward(dout, q, k, v, out, lse, None)
    wanted = (want_out.detach(), want_lse.detach(), *(x.grad for x in exact))
    for got, want in zip((out, lse, *grads), wanted, strict=True):
        assert want is not None
        assert got.shape == want.shape
        # a single position's gradients of q and k are 0
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * max(want.abs().max(), 0.1)


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    if isa == "torch":
        pytest.skip("torch's kernel does not promise it")
    q, k, v, dout = inputs(torch.bfloat16, (1, 3, 1100, 32))
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out, lse = causal.causal_forward(q, k, v, None)
        results.append((out, lse, *causal.causal_backward(dout, q, k, v, out, lse, None)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_bf16_takes_the_fast_kernel_where_there_is_one() -> None:
    q, *_ = inputs(torch.bfloat16, (1, 1, 4, 16))
    fastest = supported()[-1]
    assert causal._isa_for(q) == (fastest if fastest in ("avx512", "amx") else None)
    assert causal._isa_for(q.float()) is None
    assert causal._isa_for(q[..., :12]) is None


def test_what_does_not_fit_together_is_refused() -> None:
    q, k, v, dout = inputs(torch.bfloat16, (2, 3, 8, 16))
    for keys, values in [(k.float(), v), (k, v[:, :4]), (k[:1], v)]:
        with pytest.raises(ValueError, match="does not fit queries"):
            causal.causal_forward(q, keys, values, None)
    out, lse = causal.causal_forward(q, k, v, None)
    with pytest.raises(ValueError, match="does not fit queries"):
        causal.causal_backward(dout.float(), q, k, v, out, lse, None)

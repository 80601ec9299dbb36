"""S2-Attn against its definition, a boolean mask from sets of cuts and softmax in fp64; which kernel computes it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from loray.train import s2_attention
from loray.train.attention import attend
from loray.train.attention.attend import attend_cpu, attend_sdpa, attend_varlen
from loray.train.attention.segments import blocks, document_segments, segment_batch
from tests.fixtures.attention import (
    flash_attn_varlen_func,
    install_flash_attn,
    oracle,
    oracle_mask,
    qkv,
    runs,
    torch_varlen,
    varlen_attn_on_cpu,
)


@pytest.fixture(params=["cpu", "sdpa", "flash-attn", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to compute, on this machine's CPU."""
    chosen = {"cpu": attend_cpu, "sdpa": attend_sdpa}.get(request.param, attend_varlen)
    monkeypatch.setattr(attend, "select_backend", lambda *_: chosen)
    install_flash_attn(monkeypatch, flash_attn_varlen_func if request.param == "flash-attn" else None)
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn_on_cpu)


@dataclass
class Case:
    heads: int
    kv_heads: int
    num_tokens: int
    group: int
    ids: list[list[int]] | None = None
    num_rows: int = 1


CASES = {
    "groups": Case(4, 4, 32, 8),
    "batch": Case(4, 4, 32, 8, num_rows=3),
    "one group": Case(4, 4, 8, 8),
    "last group shorter": Case(4, 4, 29, 8, num_rows=2),
    "tail of one": Case(2, 2, 17, 8, num_rows=2),
    "shorter than half a group": Case(4, 2, 3, 8, num_rows=2),
    "one token": Case(4, 2, 1, 8),
    "smallest group": Case(2, 1, 7, 2),
    "GQA": Case(8, 4, 24, 8, num_rows=2),
    "GQA, a key-value head in both halves": Case(9, 3, 24, 8, num_rows=2),
    "MQA": Case(4, 1, 24, 8, num_rows=2),
    "MQA, odd": Case(5, 1, 24, 8),
    "odd head count": Case(3, 3, 24, 8),
    "one head": Case(1, 1, 24, 8),
    "ragged": Case(4, 2, 21, 8, [runs((0, 21)), runs((0, 13), (-1, 8)), runs((0, 2), (-1, 19))], num_rows=3),
    "ragged, all rows alike": Case(4, 2, 21, 8, [runs((0, 13), (-1, 8)), runs((3, 13), (-1, 8))], num_rows=2),
    "packed": Case(6, 3, 22, 8, [runs((0, 3), (1, 9), (2, 10)), runs((5, 8), (7, 13), (-1, 1))], num_rows=2),
    "documents cut at group cuts": Case(4, 4, 24, 8, [runs((0, 4), (1, 12), (2, 8))]),
    "documents of one token": Case(4, 2, 9, 4, [list(range(9))]),
    "an id that comes back": Case(4, 4, 16, 16, [runs((0, 5), (1, 5), (0, 6))]),
    "padding on the left and inside": Case(4, 2, 16, 8, [runs((-1, 3), (0, 5), (-1, 2), (1, 6))]),
    "a row of padding only": Case(9, 3, 10, 4, [runs((-1, 10)), runs((0, 10))], num_rows=2),
    "nothing but padding": Case(4, 2, 6, 4, [runs((-1, 6))]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.usefixtures("kernel")
def test_output_and_gradients_equal_the_boolean_mask(case: Case) -> None:
    ids_BT = None if case.ids is None else torch.tensor(case.ids)
    mask = oracle_mask(case.num_rows, case.heads, case.num_tokens, case.group, ids_BT)
    ours, theirs = (qkv(case.num_rows, case.heads, case.kv_heads, case.num_tokens) for _ in range(2))
    out = s2_attention(*ours, group_size=case.group, document_ids_BT=ids_BT)
    expected = oracle(*theirs, mask)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for result in (out, expected):
        if result.requires_grad:
            (result * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        grad = torch.zeros_like(a) if a.grad is None else a.grad
        torch.testing.assert_close(grad, b.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("ids", [None, [runs((0, 11), (1, 12), (-1, 7))]], ids=["one document", "packed and padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("kernel")
def test_no_position_sees_a_later_one(ids: list[list[int]] | None, dtype: torch.dtype) -> None:
    """Bit-equal; the paper's own code rolls the sequence and fails this."""
    ids_BT = None if ids is None else torch.tensor(ids)
    q, k, v = (x.detach() for x in qkv(1, 6, 2, 30, dtype))
    before = s2_attention(q, k, v, group_size=8, document_ids_BT=ids_BT)
    for j in (4, 8, 15, 16, 22, 29):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, j] += 3
        after = s2_attention(*changed, group_size=8, document_ids_BT=ids_BT)
        assert torch.equal(after[:, :, :j], before[:, :, :j])
        assert ids is not None or not torch.equal(after[:, :, j], before[:, :, j])


@pytest.mark.usefixtures("kernel")
def test_a_neighbouring_row_or_document_changes_nothing() -> None:
    q, k, v = (x.detach() for x in qkv(2, 4, 2, 20, torch.float32))
    ids_BT = torch.tensor([runs((0, 12), (1, 8)), runs((0, 9), (-1, 11))])
    before = s2_attention(q, k, v, group_size=8, document_ids_BT=ids_BT)
    for x in (q, k, v):
        x[0, :, :12] = 7
        x[1, :, 9:] = float("nan")
    after = s2_attention(q, k, v, group_size=8, document_ids_BT=ids_BT)
    assert torch.equal(after[0, :, 12:], before[0, :, 12:])
    assert torch.equal(after[1], before[1])


@pytest.mark.usefixtures("kernel")
def test_scale_and_transformers_memory_layout() -> None:
    """Its query is a transposed view, not a contiguous tensor."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 9, 3, 21))
    out = s2_attention(q, k, v, group_size=6, scale=0.3)
    torch.testing.assert_close(out, oracle(q, k, v, oracle_mask(2, 9, 21, 6, None), 0.3), atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("kernel")
def test_bf16_is_near_fp64() -> None:
    q, k, v = (x.detach() for x in qkv(1, 4, 2, 64, torch.bfloat16))
    out = s2_attention(q, k, v, group_size=16)
    assert out.dtype == torch.bfloat16
    exact = oracle(q.double(), k.double(), v.double(), oracle_mask(1, 4, 64, 16, None))
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


def test_memory_grows_with_the_group_not_with_the_square_of_the_row() -> None:
    """65,536 positions: one N × N boolean mask alone would be 4 GiB."""
    q, k, v = (torch.zeros(1, h, 65536, 8) for h in (2, 1, 1))
    v += 1
    out = s2_attention(q, k, v, group_size=32)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_segments_are_in_order_and_without_padding() -> None:
    ids_BT = torch.tensor([runs((0, 8), (1, 8), (-1, 4)), runs((0, 16), (1, 4))])
    found = segment_batch(2, 20, 8, document_ids_BT=ids_BT)
    assert found.plain.begins_S.tolist() == [0, 8, 20, 28, 36]
    assert found.plain.lengths_S.tolist() == [8, 8, 8, 8, 4]
    assert found.shifted.begins_S.tolist() == [0, 4, 8, 12, 20, 24, 32, 36]
    assert found.shifted.lengths_S.tolist() == [4, 4, 4, 4, 4, 8, 4, 4]
    assert (found.plain.num_covered, found.shifted.num_covered) == (36, 36)


def test_nothing_is_gathered_where_positions_are_neighbours() -> None:
    cpu = torch.device("cpu")
    found = segment_batch(2, 24, 8)
    assert blocks(found.plain, cpu) == ((8, slice(0, 48)),)
    halves, wholes = blocks(found.shifted, cpu)
    assert isinstance(halves.positions, torch.Tensor)
    assert halves.positions.tolist() == [*range(4), *range(20, 28), *range(44, 48)]
    assert (halves.length, wholes.length) == (4, 8)
    assert blocks(segment_batch(1, 24, 8).shifted, cpu)[1] == (8, slice(4, 20))


def test_a_kernel_gets_rows_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows of two lengths: documents where they begin, padding in pieces, and no tensor that is gathered."""
    seen: list[tuple[int, list[int], int]] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, begins_S: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((q.untyped_storage().data_ptr(), begins_S.tolist(), rest[1]))
        return varlen_attn_on_cpu(q, k, v, begins_S, *rest, **options)

    install_flash_attn(monkeypatch, None)
    monkeypatch.setattr(torch_varlen, "varlen_attn", watched)
    monkeypatch.setattr(attend, "select_backend", lambda *_: attend_varlen)
    monkeypatch.setattr(attend, "_PIECE", 4)
    ids_BT = torch.tensor([runs((0, 9), (1, 11)), runs((0, 11), (-1, 9))])
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 4, 2, 20))  # as projections give them
    out = attend.attend_heads(q, k, v, document_segments(ids_BT), first=0, repeats=2)
    assert seen == [(q.untyped_storage().data_ptr(), [0, 9, 20, 31, 35, 39, 40], 11)]
    assert not out[1, 11:].any()
    monkeypatch.setattr(attend, "select_backend", lambda *_: attend_sdpa)
    expected = attend.attend_heads(q, k, v, document_segments(ids_BT), first=0, repeats=2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("group", [0, 1, 7, -2])
def test_odd_or_empty_groups_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match="even"):
        s2_attention(*qkv(1, 2, 2, 8), group_size=group)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv(2, 3, 2, 8)
    with pytest.raises(ValueError, match="do not divide"):
        s2_attention(q, k, v, group_size=4)
    with pytest.raises(ValueError, match="fit together"):
        s2_attention(q, k[:, :, :4], v[:, :, :4], group_size=4)
    with pytest.raises(ValueError, match="document ids"):
        s2_attention(*qkv(2, 4, 2, 8), group_size=4, document_ids_BT=torch.zeros(1, 8))


def test_one_call_computes_all_segments_of_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last group of shifted heads too, which are halves of one: (segments × key-value heads, R)."""
    calls = []

    def counted(q: Tensor, *rest: object, **options: object) -> tuple[Tensor, Tensor]:
        calls.append(tuple(q.shape))
        return forward(q, *rest, **options)

    forward = attend.causal_forward
    monkeypatch.setattr(attend, "causal_forward", counted)
    q, k, v = qkv(2, 9, 3, 32)
    s2_attention(q, k, v, group_size=8)
    plain, shifted = {(8, 3, 8, 8), (8, 1, 8, 8)}, {(4, 2, 4, 8), (6, 2, 8, 8), (4, 3, 4, 8), (6, 3, 8, 8)}
    assert set(calls) == plain | shifted
    assert len(calls) == 6


def test_a_backward_pass_reads_what_the_forward_pass_saw() -> None:
    q, k, v = qkv(1, 4, 2, 16)
    out = s2_attention(q, k, v, group_size=8)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def flash_attn_of_2023(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    raise AssertionError("it has no parameter that says whether its backward pass is deterministic")


def varlen_attn_of_2025(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
    scale: float | None = None,
) -> Tensor:
    raise AssertionError("it has neither windows nor heads that share keys")


NONE, OLD, NEW = None, flash_attn_of_2023, flash_attn_varlen_func


@pytest.mark.parametrize(
    ("device", "dtype", "width", "flash_attn", "has_new_torch", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, 128, NEW, True, 9, attend_varlen),
        ("cuda", torch.float32, 128, NEW, True, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 512, NEW, True, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 128, NONE, True, 9, attend_varlen),
        ("cuda", torch.bfloat16, 128, OLD, True, 9, attend_varlen),
        ("cuda", torch.bfloat16, 128, NEW, False, 9, attend_varlen),
        ("cuda", torch.bfloat16, 128, NONE, False, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 128, OLD, False, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 12, NEW, True, 9, attend_varlen),
        ("cuda", torch.bfloat16, 12, NONE, True, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 12, OLD, True, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 128, NEW, True, 7, attend_sdpa),
        ("cpu", torch.bfloat16, 128, NEW, True, 9, attend_cpu),
        ("meta", torch.bfloat16, 128, NEW, True, 9, attend_sdpa),
    ],
)
def test_choice_of_a_kernel(
    device: str,
    dtype: torch.dtype,
    width: int,
    flash_attn: object,
    has_new_torch: bool,
    capability: int,
    expected: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_flash_attn(monkeypatch, flash_attn)
    if not has_new_torch:
        monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn_of_2025)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    choose = attend.select_backend.__wrapped__  # what an earlier case chose is kept
    assert choose(torch.device(device), dtype, width) is expected


def test_a_torch_without_attention_to_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attn(monkeypatch, None)
    monkeypatch.setitem(sys.modules, torch_varlen.__name__, None)
    assert attend._kernel() is None


@pytest.mark.parametrize("ids", [None, [runs((0, 11), (1, 12), (-1, 7))]], ids=["one document", "packed and padded"])
def test_the_function_of_the_installed_torch_takes_its_arguments(
    ids: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, without storage: the function itself runs, and its kernel says the shapes alone."""
    install_flash_attn(monkeypatch, None)
    monkeypatch.setattr(attend, "select_backend", lambda *_: attend_varlen)
    q, k, v = (x.detach().to("meta").requires_grad_() for x in qkv(1, 9, 3, 30, torch.bfloat16))
    out = s2_attention(q, k, v, group_size=8, document_ids_BT=None if ids is None else torch.tensor(ids))
    assert out.shape == q.shape
    out.sum().backward()
    assert [x.grad is not None and x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]

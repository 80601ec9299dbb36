"""The ops of a bank in fp64: gradients of inputs by finite differences, those of weights by autograd.

DoRA's norms are fp32 in any dtype.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loray.methods.pairs import PairKey
from loray.methods.vera_module import draw_pair
from loray.methods.weights import row_squares
from loray.train.many.dora import scale_outputs
from loray.train.many.lora import add_lora
from loray.train.many.products import has_grouped
from loray.train.many.rows import Member, Rows, lay_out
from loray.train.many.stacks import Bucket, BucketKey
from loray.train.many.vera import add_vera

PATHS = ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.0.mlp.up_proj")
WIDTH, OUTS = 6, (5, 3, 4)
LINEARS = {path: (out, WIDTH) for path, out in zip(PATHS, OUTS, strict=True)}
NUM_TOKENS = (2, 2, 3, 1)  # of the adapters of each bucket
SCALES = (2.0, 2.0, 0.5, 2.0)


def buckets(kind: Any) -> list[Bucket]:
    """Two, of which one lacks a module; four adapters each, in slots that are not all neighbours."""
    pair = PairKey(0, 4, WIDTH, max(OUTS)) if kind == "vera" else None
    found = []
    for paths in (PATHS, PATHS[1:]):
        modules = tuple(path.rpartition(".")[2] for path in paths)
        key = BucketKey(kind, 4, modules, 0.0, pair)
        bucket = Bucket(key, {path: LINEARS[path] for path in paths}, torch.float64, torch.device("cpu"))
        for _ in range(5):
            bucket.take()
        generator = torch.Generator().manual_seed(len(found))
        bucket.memory.master.normal_(generator=generator)
        found.append(bucket)
    return found


SLOTS = (0, 1, 2, 4)


class Linear(nn.Module):
    """What DoRA scales: a module of the base with a bias, and the squares of its rows' norms."""

    def __init__(self, out: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(out)
            self.base_layer = nn.Linear(WIDTH, out).double().requires_grad_(False)
        self.initial_square_O = row_squares(self.base_layer.weight)


MODULES = {path: Linear(out) for path, out in zip(PATHS, OUTS, strict=True)}


def rows_of(own: list[Bucket]) -> Rows:
    return lay_out([Member(bucket, *a, None) for bucket in own for a in zip(SLOTS, SCALES, NUM_TOKENS, strict=True)])


def by_the_formula(kind: Any, own: list[Bucket], x_MI: Tensor, weights: dict[tuple[int, int, str], Tensor]) -> Tensor:
    """What is added to the outputs of all modules, side by side, for one adapter after the other."""
    found, at = [], 0
    for number, bucket in enumerate(own):
        for slot, scale, num in zip(SLOTS, SCALES, NUM_TOKENS, strict=True):
            x, outs = x_MI[at : at + num], []
            at += num
            for path, out in zip(PATHS, OUTS, strict=True):
                if path not in bucket.paths:
                    outs.append(MODULES[path].base_layer(x) if kind == "dora" else x.new_zeros(num, out))
                    continue
                first, second = (weights[number, slot, bucket.name(path, k)] for k in kind_names(kind))
                if kind == "vera":
                    pair = draw_pair(*bucket.key.pair)  # type: ignore[misc]
                    inner = x @ pair.a_RI.double()[:, :WIDTH].T
                    outs.append(second * ((first * inner) @ pair.b_OR.double()[:out].T))
                    continue
                plain = scale * (x @ first.T) @ second.T
                if kind == "lora":
                    outs.append(plain)
                    continue
                module, change = MODULES[path], weights[number, slot, bucket.name(path, "m")]
                weight = module.base_layer.weight.detach()
                norm = (weight + scale * second @ first).detach().norm(dim=1)
                plain = plain + x @ weight.T
                outs.append((weight.norm(dim=1) + change) / norm * plain + module.base_layer.bias)
            found.append(torch.cat(outs, dim=1))
    return torch.cat(found)


def kind_names(kind: str) -> str:
    return "db" if kind == "vera" else "ab"


def by_the_ops(kind: Any, own: list[Bucket], x_MI: Tensor) -> Tensor:
    anchor, rows = torch.zeros((), requires_grad=True), rows_of(own)
    found = []
    for path, out in zip(PATHS, OUTS, strict=True):
        y_MO = MODULES[path].base_layer(x_MI) if kind == "dora" else x_MI.new_zeros(len(x_MI), out)
        if kind == "vera":
            found.append(add_vera(y_MO, x_MI, x_MI, rows, path, anchor))
        else:
            y_MO = add_lora(y_MO, x_MI, x_MI, rows, path, anchor)
            found.append(scale_outputs(y_MO, rows, path, MODULES[path], anchor))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("kind", "bound"), [("lora", 1e-12), ("vera", 1e-12), ("dora", 1e-5)])
def test_gradients(kind: Any, bound: float) -> None:
    own = buckets(kind)
    generator = torch.Generator().manual_seed(0)
    num_tokens = 2 * sum(NUM_TOKENS)
    x_MI = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: by_the_ops(kind, own, x), (x_MI,))

    for bucket in own:
        bucket.memory.gradient.zero_()
    weights = {
        (number, slot, name): weight.clone().requires_grad_()
        for number, bucket in enumerate(own)
        for slot in SLOTS
        for name, weight in bucket.named(bucket.memory.master, slot)
    }
    expected, found = by_the_formula(kind, own, x_MI, weights), by_the_ops(kind, own, x_MI)
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    factors = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (expected * factors).sum().backward()
    (ours,) = torch.autograd.grad((found * factors).sum(), x_MI)
    torch.testing.assert_close(ours, x_MI.grad, rtol=bound, atol=bound)
    for number, bucket in enumerate(own):
        for slot in SLOTS:
            for name, gradient in bucket.named(bucket.memory.gradient, slot):
                torch.testing.assert_close(gradient, weights[number, slot, name].grad, rtol=bound, atol=bound)
        assert not bucket.memory.gradient[3].any()  # a slot without rows


def test_grouped_products_are_those_of_each() -> None:
    """What a GPU computes in bf16, by the loop that torch has for it on a CPU."""
    key = BucketKey("lora", 8, ("q_proj", "v_proj"), 0.0, None)
    linears = {"layers.0.self_attn.q_proj": (16, 32), "layers.0.self_attn.v_proj": (8, 32)}
    members = list(zip(SLOTS, SCALES, NUM_TOKENS, strict=True))
    x_MI = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    results = []
    for grouped in (None, torch.device("cpu")):
        bucket = Bucket(key, linears, torch.bfloat16, torch.device("cpu"))
        for _ in range(5):
            bucket.take()
        bucket.memory.master.normal_(generator=torch.Generator().manual_seed(1))
        bucket.refresh(slice(0, 5))
        rows = lay_out([Member(bucket, *member, None) for member in members], grouped)
        assert (rows.parts[0].groups is None) == (grouped is None)
        anchor = torch.zeros((), requires_grad=True)
        outs = [add_lora(x_MI.new_zeros(8, out), x_MI, x_MI, rows, path, anchor) for path, (out, _) in linears.items()]
        (dx_MI,) = torch.autograd.grad(torch.cat(outs, dim=1).float().square().mean(), x_MI)
        results.append([*(out.detach() for out in outs), dx_MI, bucket.memory.gradient[list(SLOTS)]])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2
    assert not has_grouped(torch.device("cpu"), torch.bfloat16)


def test_the_first_layers_input_needs_no_gradient() -> None:
    own = buckets("lora")
    for bucket in own:
        bucket.memory.gradient.zero_()
    x_MI = torch.randn(2 * sum(NUM_TOKENS), WIDTH, dtype=torch.float64)
    found = by_the_ops("lora", own, x_MI)
    found.sum().backward()
    assert all(bucket.memory.gradient[slot].any() for bucket in own for slot in SLOTS)
    with torch.no_grad():
        assert not by_the_ops("lora", own, x_MI).requires_grad

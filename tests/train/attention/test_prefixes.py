"""Trees of sequences: what they share is a node once, and attention along their paths is each sequence's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from loray.bases.registry import BaseModel
from loray.errors import UnsupportedError
from loray.train.attention.attend import attend_heads
from loray.train.attention.prefixes import Ids, PathSegments, PrefixTree, along_paths, attend_paths, plant
from loray.train.attention.segments import document_segments
from loray.train.hooks import ATTENTION, DENSE, takes_paths
from loray.train.model import load_model
from loray.train.objectives import tree_losses
from tests.fixtures.bank import norm_in_fp64

BaseFactory = Callable[..., BaseModel]


def ids(*sequences: Sequence[int]) -> list[Ids]:
    return [np.array(sequence, np.int32) for sequence in sequences]


ANSWERS = ids([5, 6, 7, 1, 2], [5, 6, 7, 1, 3, 4], [5, 6, 7, 9], [5, 6, 7, 1, 2])
OTHERS = ids([8, 8, 8], [8, 8], [7, 8, 8, 1, 1, 1])


def tree_of(sequences: Sequence[Ids]) -> PrefixTree:
    (tree,) = plant(sequences, 1000, 1000)
    return tree


def test_each_distinct_prefix_is_a_node() -> None:
    tree = tree_of(ANSWERS)
    assert tree.token_ids == [5, 6, 7, 1, 2, 3, 4, 9]
    assert tree.positions == [0, 1, 2, 3, 4, 4, 5, 3]
    assert tree.nodes == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5, 6], [0, 1, 2, 7], [0, 1, 2, 3, 4]]
    assert (len(tree), tree.num_tokens) == (8, 20)


def test_a_path_for_each_leaf_alone() -> None:
    """What is said twice, and what another goes on from, has no path of its own."""
    assert tree_of(ANSWERS).paths() == tree_of(ANSWERS).nodes[:3]
    assert tree_of(OTHERS).paths() == [[0, 1, 2], [3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("max_nodes", "max_tokens", "wanted"),
    [
        (8, 20, [8]),
        (8, 19, [8, 5]),  # the last begins a tree of its own, and holds its prefix again
        (7, 100, [7, 6]),
        (3, 100, [5, 6, 4, 5]),  # a sequence that is longer is alone
        (100, 1, [5, 6, 4, 5]),
    ],
)
def test_trees_keep_their_limits_and_the_order(max_nodes: int, max_tokens: int, wanted: list[int]) -> None:
    trees = plant(ANSWERS, max_nodes, max_tokens)
    assert [len(tree) for tree in trees] == wanted
    rebuilt = [[tree.token_ids[u] for u in nodes] for tree in trees for nodes in tree.nodes]
    assert rebuilt == [sequence.tolist() for sequence in ANSWERS]


def test_attention_along_paths_is_each_sequence_s_own() -> None:
    """In fp64, forward and backward, with two trees of different size in one batch, grouped heads and padding."""
    heads, kv_heads, width = 6, 2, 8
    trees = [tree_of(ANSWERS), tree_of(OTHERS)]
    length = max(map(len, trees)) + 2
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        return torch.randn(2, num_heads, length, width, dtype=torch.float64, generator=generator, requires_grad=True)

    inputs = [draw(heads), draw(kv_heads), draw(kv_heads)]
    out_BTHD = attend_paths(*inputs, PathSegments.of(trees, length, torch.device("cpu")), scale=0.3)
    weight_BTHD = torch.randn(out_BTHD.shape, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad((out_BTHD * weight_BTHD).sum(), inputs)

    wanted_BTHD = torch.zeros_like(out_BTHD)
    for b, tree in enumerate(trees):
        for nodes in tree.nodes:  # later ones write the same again: of a shared node the last counts, once
            q, k, v = (x[b : b + 1, :, nodes] for x in inputs)
            segments = document_segments(torch.zeros(1, len(nodes), dtype=torch.int64))
            out_THD = attend_heads(q, k, v, segments, first=0, repeats=heads // kv_heads, scale=0.3)[0]
            wanted_BTHD = wanted_BTHD.index_put((torch.full((len(nodes),), b), torch.tensor(nodes)), out_THD)
    torch.testing.assert_close(out_BTHD, wanted_BTHD, rtol=1e-12, atol=1e-12)
    assert not out_BTHD[0, len(trees[0]) :].any()
    for ours, theirs in zip(found, torch.autograd.grad((wanted_BTHD * weight_BTHD).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_of_trees_are_the_sequences_own(
    tiny_base: BaseFactory, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """In fp64, against transformers' own attention, a sequence at a time; two targets of one prefix are two losses."""
    norm_in_fp64(monkeypatch)
    base = tiny_base("LlamaForCausalLM", std=0.05)
    model = load_model(base, dtype="float32").double()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float64)
    for each in (model, plain):
        each.get_output_embeddings().weight.requires_grad_(False)
    random = np.random.default_rng(0)
    targets = [random.integers(0, 256, len(sequence)) for sequence in (*ANSWERS, *OTHERS)]
    losses_N = tree_losses(model, [tree_of(ANSWERS), tree_of(OTHERS)], targets)
    rows = []
    for sequence, labels in zip((*ANSWERS, *OTHERS), targets, strict=True):
        logits_TV = plain(input_ids=torch.from_numpy(sequence.astype(np.int64))[None]).logits[0]
        rows.append(torch.nn.functional.cross_entropy(logits_TV, torch.from_numpy(labels), reduction="none"))
    wanted_N = torch.cat(rows)
    torch.testing.assert_close(losses_N, wanted_N, rtol=1e-10, atol=1e-10)
    weights_N = torch.from_numpy(random.normal(size=len(losses_N)))
    for losses in (losses_N, wanted_N):
        (losses * weights_N).sum().backward()  # type: ignore[no-untyped-call]
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) > 9
    for name, found in trained.items():
        torch.testing.assert_close(found, grads[name], rtol=1e-9, atol=1e-11, msg=name)


def test_other_attention_is_refused_along_paths() -> None:
    """A window is counted in positions of a row, and a tree's are no sequence's."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    paths = PathSegments.of([tree_of(ANSWERS)], 8, torch.device("cpu"))
    for config in (
        MistralConfig(**sizes, **heads, sliding_window=4),
        LlamaConfig(**sizes, **heads, attention_dropout=0.1),
    ):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=DENSE)
        assert not takes_paths(model.config)
        with along_paths(paths), pytest.raises(UnsupportedError, match="compute rows apart"):
            model(input_ids=torch.ones(1, 8, dtype=torch.int64))
    config = LlamaConfig(**sizes, **heads)
    assert takes_paths(AutoModelForCausalLM.from_config(config, attn_implementation=DENSE).config)
    config.s2_group_size = 4
    assert not takes_paths(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).config)

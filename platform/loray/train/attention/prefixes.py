"""Sequences whose common beginnings are computed once: answers to one prompt, conversations below one system prompt.

Each distinct prefix of the sequences is a node of a tree, and a tree is one row of the model: a token for each node, at
the position that it has in its sequences. Everything but attention sees a node once. Attention takes the tree's paths,
from its root to each leaf, as so many segments, so that each backend computes it; of a node on several paths it is the
same in each.

Shapes: B trees, padded to T nodes, N = B·T; G tokens of all paths, M nodes; H query heads, K key-value heads, D head
width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loray.train.attention.attend import attend_heads
from loray.train.attention.segments import AttentionSegments

Ids = NDArray[np.int32]


class PrefixTree:
    """The tree of some sequences. Node u has the token `token_ids[u]` at `positions[u]`; the tokens of sequence i are
    at `nodes[i]`.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.nodes: list[list[int]] = []
        self._children: dict[tuple[int, int], int] = {}  # of a node (-1: none), by their tokens

    def __len__(self) -> int:
        """Count the nodes."""
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """The tokens of all sequences."""
        return sum(map(len, self.nodes))

    def num_new(self, sequence: Ids) -> int:
        """Count the nodes that this sequence would add."""
        node = -1
        for position, token in enumerate(sequence.tolist()):
            node = self._children.get((node, token), -1)
            if node < 0:
                return len(sequence) - position
        return 0

    def add(self, sequence: Ids) -> None:
        nodes: list[int] = []
        node = -1
        for position, token in enumerate(sequence.tolist()):
            node = self._children.setdefault((node, token), len(self))
            if node == len(self):
                self.token_ids.append(token)
                self.positions.append(position)
            nodes.append(node)
        self.nodes.append(nodes)

    def paths(self) -> list[list[int]]:
        """List the nodes of each path to a leaf: of the sequences that are not the beginning of another, each once."""
        inner = {parent for parent, _ in self._children}
        return list({nodes[-1]: nodes for nodes in self.nodes if nodes[-1] not in inner}.values())


def plant(sequences: Sequence[Ids], max_nodes: int, max_tokens: int) -> list[PrefixTree]:
    """Make trees of sequences in their order, of at most so many nodes and tokens each, or of a single sequence."""
    trees: list[PrefixTree] = []
    for sequence in sequences:
        tree = trees[-1] if trees else None
        if (
            tree is None
            or len(tree) + tree.num_new(sequence) > max_nodes
            or tree.num_tokens + len(sequence) > max_tokens
        ):
            tree = PrefixTree()
            trees.append(tree)
        tree.add(sequence)
    return trees


@dataclass(frozen=True, slots=True, eq=False)
class PathSegments:
    """The paths of a batch of trees.

    places_G  of the tokens of all paths, one path after the other, among the N positions
    segments  of the G tokens: a path each
    nodes_M   positions that are nodes and no padding, and from_M their first token among the G
    longest   tokens of a path
    """

    places_G: Tensor
    segments: AttentionSegments
    nodes_M: Tensor
    from_M: Tensor
    longest: int

    @classmethod
    def of(cls, trees: Sequence[PrefixTree], num_nodes: int, device: torch.device) -> PathSegments:
        """Find the paths of trees that are padded to T = `num_nodes`."""
        paths = [np.array(path) + b * num_nodes for b, tree in enumerate(trees) for path in tree.paths()]
        lengths_S = torch.tensor([len(path) for path in paths])
        places_G = np.concatenate(paths)
        nodes_M, from_M = np.unique(places_G, return_index=True)
        return cls(
            torch.from_numpy(places_G).to(device),
            AttentionSegments(lengths_S.cumsum(0) - lengths_S, lengths_S),
            torch.from_numpy(nodes_M).to(device),
            torch.from_numpy(from_M).to(device),
            int(lengths_S.max()),
        )


_active: ContextVar[PathSegments | None] = ContextVar("_active", default=None)


@contextmanager
def along_paths(paths: PathSegments) -> Iterator[None]:
    """Inside the block the rows that the model is given are trees."""
    token = _active.set(paths)
    try:
        yield
    finally:
        _active.reset(token)


def active_paths() -> PathSegments | None:
    return _active.get()


def attend_paths(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, paths: PathSegments, *, scale: float | None = None
) -> Tensor:
    """Compute causal attention along the paths → (B, T, H, D), 0 on padding.

    The backward pass computes it again: kept for it, the paths' tokens would take more memory than the nodes.
    """
    out: Tensor = checkpoint(
        _attend, q_BHTD, k_BKTD, v_BKTD, paths, scale, use_reentrant=False, preserve_rng_state=False
    )
    return out


def _attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, paths: PathSegments, scale: float | None) -> Tensor:
    num_rows, num_heads, num_nodes, width = q_BHTD.shape
    q, k, v = (  # (1, heads, G, D)
        x.transpose(1, 2).flatten(0, 1).index_select(0, paths.places_G).transpose(0, 1)[None]
        for x in (q_BHTD, k_BKTD, v_BKTD)
    )
    repeats = num_heads // k.shape[1]
    out_GHD = attend_heads(q, k, v, paths.segments, first=0, repeats=repeats, scale=scale)[0]
    out_MHD = out_GHD.index_select(0, paths.from_M)
    out_NHD = out_GHD.new_zeros(num_rows * num_nodes, num_heads, width).index_copy(0, paths.nodes_M, out_MHD)
    return out_NHD.view(num_rows, num_nodes, num_heads, width)

"""`PrefixCache` keeps the blocks of KV cache that other requests may use again, and copies idle ones to host memory."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple, Protocol

from loray.engine.memory.blocks import BlockAllocator
from loray.engine.memory.eviction import Inflation, PriorityQueue, Reuse
from loray.engine.memory.host_memory import BlockCopy, HostMemory
from loray.policy.prefixes import TOLD_BLOCKS, activated, block_names, chained, told
from loray.telemetry import get_logger

_log = get_logger(__name__)

_MOST_SAVED = 256  # blocks that are copied to the host at once
_MOST_TOLD = 4096  # names: 32 KiB of a report


class _Activation(NamedTuple):
    """The key of what an adapter has computed after the base: it is active from token `offset` of the next block on."""

    digest: str
    offset: int


_Key = str | tuple[int, ...] | _Activation | None


@dataclass(slots=True, eq=False)
class _Node:
    """A block of tokens after those of its parents. The root's children stand for adapters, and those of their children
    that have a text as key for salts; neither holds a block, nor does an activation.

    uses  requests that computed it or found it
    depth  blocks up to this one
    rank  since it is idle: its value; of equal ones what was released first
    name  see `policy.prefixes`, and what it depends on; empty before they were asked for
    """

    key: _Key
    block: int
    parent: _Node | None
    children: dict[_Key, _Node] = field(default_factory=dict)
    uses: int = 0
    depth: int = 0
    rank: tuple[float, int] = (0.0, 0)
    name: str = ""
    owners: frozenset[str | None] = frozenset()


class BlockCopies(Protocol):
    """Copies blocks of keys and values between the pool and host memory, beside the steps.

    host_bytes  that a block's copy takes
    """

    @property
    def host_bytes(self) -> int: ...

    def save(self, blocks: Sequence[int]) -> Future[list[Any]]:
        """Begin to copy blocks that are computed, or will be by the steps that have been launched. Blocks that are
        given to others meanwhile are read as they are then.
        """
        ...

    def restore(self, copies: Mapping[int, Any]) -> Callable[[], bool]:
        """Begin to copy these into blocks. Returns what says whether all are there; before that, whatever reads them
        calls `wait`.
        """
        ...

    def wait(self) -> None:
        """Let the next step see what is restored. Nobody waits here."""
        ...


class HostTier(NamedTuple):
    """`wake`: called in any thread when copies have been made: a load may wait for the memory that they reserve."""

    memory: HostMemory[Any]
    copies: BlockCopies
    wake: Callable[[], None] = lambda: None


class PrefixCache:
    """Full blocks by their tokens, in one tree for each adapter's content digest and one for the base.

    Blocks are compared by their tokens, never by a hash of them. A digest covers all that determines an adapter's keys
    and values: so nothing is shared across adapters or versions, and prefixes stay valid when their adapter leaves the
    pool. Callers with a salt share with those of the same salt alone.

    An adapter that is active from a later token on (aLoRA) is a branch of the base's tree: the blocks before the one
    with that token are the base's, which the base and all such adapters share.

    Only full blocks are shared, and no request writes to a full block, so there is no copy on write. A block of a
    prompt is known as soon as the step that fills it is scheduled: in each layer a step writes the keys and values of
    all its tokens before any of them attends, so requests of that step share it too.

    A request that holds a block of the tree holds all blocks before it. The cache holds one reference to each of its
    blocks; each request that uses a block holds another one. A block that no request holds is idle. Idle blocks are
    evicted by their value, see `eviction`, and the end of a prefix before its beginning.

    A request that has called `store` releases its KV blocks with `release`, not with the allocator.

    With a host tier, idle blocks are copied to host memory by and by, beginning with a prefix's first ones, so that
    they have a copy when they are evicted. There a block is known by its name, which is a digest of its tokens. A block
    that is evicted or moved before its copy has been made has none: what was read may be another's.

    What is on the host too is worth the time to bring it back from there.

    inflation      of the pool's blocks
    token_seconds  to compute a token of a prompt again; 0 while that is not known: then a block has no value
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        enabled: bool = True,
        inflation: Inflation | None = None,
        token_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._allocator = allocator
        self.enabled = enabled
        self._inflation, self._reuse = inflation or Inflation(), Reuse()
        self._token_seconds = token_seconds
        self._block_tokens = allocator.geometry.block_tokens
        self._root = _Node(None, -1, None)
        self._nodes: dict[int, _Node] = {}
        self._idle: set[_Node] = set()
        self._ends: PriorityQueue[_Node] = PriorityQueue()  # idle blocks after which none is known, by rank
        self._num_released = 0
        self.host: HostTier | None = None
        self._restore_seconds = float("inf")  # of a block; not known yet
        self._unsaved: deque[_Node] = deque()  # idle ones that have no copy; some have gone since
        self._saving: tuple[Future[list[Any]], list[tuple[int, _Node | None]]] | None = None
        self._untold: deque[_Node] = deque(maxlen=_MOST_TOLD)  # new ones whose names routers are to be told
        self._told: OrderedDict[str, None] = OrderedDict()  # those that were used longest ago first
        self._unwritten: list[_Node] = []  # known, and not computed before the step that is being scheduled

    @property
    def num_idle(self) -> int:
        """Blocks that `evict` could free."""
        return len(self._idle)

    @property
    def least_value(self) -> float | None:
        """The value of the block that `evict` would free first; None if none is idle."""
        least = self._ends.peek()
        return None if least is None else least[0][0]

    def match(
        self,
        digest: str | None,
        tokens: Sequence[int],
        salt: str = "",
        active_from: int = 0,
        known: Sequence[int] = (),
    ) -> list[int]:
        """Return the full blocks of the longest known prefix of `tokens`, retained for the caller. They count as used
        when `used` is told that its request runs: one that waits for blocks looks again and again.

        active_from  token from which the adapter is active; those before it are the base's
        known        blocks of the tree that the caller holds, with the tokens before `tokens`
        """
        if known:
            node: _Node | None = self._nodes[known[-1]]
        else:
            node = self._root.children.get(None if active_from else digest)
            if salt and node is not None:
                node = node.children.get(salt)
        branch = self._branch(digest, active_from)
        blocks: list[int] = []
        for i, key in enumerate(self._keys(tokens), len(known)):
            if node is not None and i in branch:
                node = node.children.get(branch[i])
            node = None if node is None else node.children.get(key)
            if node is None:
                break
            self._retain(node)
            blocks.append(node.block)
        return blocks

    def used(self, blocks: Sequence[int]) -> None:
        """A request that has begun to run found these."""
        for block in blocks:
            node = self._nodes[block]
            self._use(node)
            if (name := told(node.name)) in self._told:
                self._told.move_to_end(name)
            if self.host is not None:
                self.host.memory.touch(self._name(node), self._worth(node), self._before(node))

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def store(
        self,
        digest: str | None,
        tokens: Sequence[int],
        blocks: list[int],
        salt: str = "",
        num_known: int = 0,
        active_from: int = 0,
        *,
        ahead: bool = False,
    ) -> list[int]:
        """Add `blocks`, of which the tree has the first `num_known`; the others hold the keys and values of `tokens`.

        Returns what the request holds from now on: `blocks` itself, or, if the tree already has blocks of the same
        tokens, a new list with those in place of the request's.

        ahead  The step that is being scheduled will write them, see `unwritten`. A block whose tokens the tree has
               already is left out with those after it, since the request would write to the tree's.
        """
        if not self.enabled or len(tokens) < self._block_tokens:
            return blocks
        held = blocks
        if num_known:
            node = self._nodes[blocks[num_known - 1]]
        else:
            node = self._child(self._root, None if active_from else digest, -1)
            if salt:
                node = self._child(node, salt, -1)
        branch = self._branch(digest, active_from)
        for i, key in enumerate(self._keys(tokens), num_known):
            if i in branch:
                node = self._child(node, branch[i], -1)
            known = node.children.get(key)
            if known is None:
                known = self._child(node, key, blocks[i])
                self._nodes[blocks[i]] = known
                self._use(known)
                self._allocator.retain_kv((blocks[i],))
                if ahead:
                    self._unwritten.append(known)
            elif known.block != blocks[i] and ahead:
                break
            elif known.block != blocks[i]:
                self._retain(known)
                self._use(known)
                self._allocator.release_kv((blocks[i],))
                if held is blocks:
                    held = [*blocks]
                held[i] = known.block
            node = known
        return held

    def release(self, blocks: Sequence[int]) -> None:
        """Release a request's references to its blocks, given in the order of its tokens."""
        unsaved: list[_Node] = []
        for block in reversed(blocks):
            self._allocator.release_kv((block,))
            node = self._nodes.get(block)
            if node is not None and self._allocator.references(block) == 1:
                self._num_released += 1
                is_saved = self.host is not None and self.host.memory.block(node.name) is not None
                self._rank(node, self._num_released, is_saved=is_saved)
                self._idle.add(node)
                if not node.children:
                    self._ends.set(node, node.rank)
                if self.host is not None and not is_saved:
                    unsaved.append(node)
        self._unsaved.extend(reversed(unsaved))

    def step_begins(self) -> None:
        """The last step has written its blocks."""
        self._unwritten.clear()

    def drop_unwritten(self) -> frozenset[int]:
        """The step that should have written them has failed: forget these blocks, and return them."""
        dropped = [node for node in reversed(self._unwritten) if self._nodes.get(node.block) is node]
        for node in dropped:
            self._cut(node)
        self._unwritten.clear()
        return frozenset(node.block for node in dropped)

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` idle blocks; returns how many."""
        freed = 0
        while freed < num_blocks and (least := self._ends.peek()) is not None:
            (value, _), node = least
            self._detach(node)
            self._inflation.evicted(value)
            self._drop(node)
            freed += 1
        return freed

    def forget(self, digest: str | None) -> None:
        """Drop all prefixes of an adapter, or of the base with what adapters computed after it. Requests that hold
        blocks of them keep those blocks.
        """
        if self.host is not None:
            self.host.memory.forget_blocks(digest)
        own = [node for node in self._root.children.values() if node.key == digest]
        base = self._root.children.get(None)
        if digest is not None and base is not None:  # below the base alone adapters become active
            own += [n for n in _below(base) if isinstance(n.key, _Activation) and n.key.digest == digest]
        for node in own:
            self._cut(node)

    def moved(self, moves: Mapping[int, int]) -> None:
        """The contents of blocks have been copied from the keys of `moves` to its values."""
        if self._saving is not None:
            saved, saving = self._saving
            self._saving = saved, [(block, None if block in moves else node) for block, node in saving]
        nodes = [(moves[block], self._nodes.pop(block)) for block in moves if block in self._nodes]
        for block, node in nodes:
            node.block = block
            self._nodes[block] = node

    def blocks(self) -> list[int]:
        return list(self._nodes)

    def told(self) -> tuple[str, ...]:
        """Return names of prefixes that are known, which routers are told: the ones that were used last."""
        for node in self._untold:
            if self._nodes.get(node.block) is node:
                self._told[told(self._name(node))] = None
        self._untold.clear()
        while len(self._told) > _MOST_TOLD:
            self._told.popitem(last=False)
        return tuple(self._told)

    # -- the host tier ------------------------------------------------------------------------------------------------

    def save_idle(self) -> None:
        """Take the copies that have been made, and begin to make those of further idle blocks."""
        if self.host is None or not (self._saving or self._unsaved):
            return
        memory, copies, wake = self.host
        if self._saving is not None:
            saved, nodes = self._saving
            if not saved.done():
                return
            self._saving = None
            memory.end_reservation(copies.host_bytes * len(nodes))
            if (error := saved.exception()) is not None:
                _log.warning("idle prefixes were not copied to host memory: %r", error)
                self._unsaved.clear()
                return
            for (block, node), values in zip(nodes, saved.result(), strict=True):
                if node is not None and self._nodes.get(block) is node:
                    copy = BlockCopy(values, copies.host_bytes, node.owners)
                    memory.add_block(node.name, copy, self._worth(node), self._before(node))
                    if node in self._idle:
                        self._rank(node, node.rank[1], is_saved=True)
                        if not node.children:
                            self._ends.set(node, node.rank)
        unsaved: dict[int, _Node] = {}
        while self._unsaved and len(unsaved) < _MOST_SAVED:
            node = self._unsaved.popleft()
            if self._nodes.get(node.block) is node and memory.block(self._name(node)) is None:
                unsaved[node.block] = node
        are_kept = memory.would_keep([self._worth(node) for node in unsaved.values()], copies.host_bytes)
        found: list[tuple[int, _Node | None]] = [*compress(unsaved.items(), are_kept)]
        if found:
            memory.reserve(copies.host_bytes * len(found))
            self._saving = copies.save([block for block, _ in found]), found
            self._saving[0].add_done_callback(lambda _: wake())

    def on_host(
        self, digest: str | None, tokens: Sequence[int], salt: str = "", active_from: int = 0, known: Sequence[int] = ()
    ) -> dict[str, BlockCopy]:
        """Find the copies of the blocks that follow `known`, by name and in order, up to the first that has none.
        Arguments as in `match`.
        """
        found: dict[str, BlockCopy] = {}
        if self.host is None:
            return found
        before = (len(known), self._name(self._nodes[known[-1]]) if known else "")
        for name in block_names(digest, tokens, self._block_tokens, salt=salt, active_from=active_from, before=before):
            copy = self.host.memory.block(name)
            if copy is None:
                break
            found[name] = copy
        return found

    def restored(self, seconds: float) -> None:
        """A block came back from the host in this time."""
        known = self._restore_seconds
        self._restore_seconds = seconds if known == float("inf") else known + 0.1 * (seconds - known)

    def _worth(self, node: _Node, *, is_saved: bool = False) -> float:
        seconds = self._block_tokens * self._token_seconds()
        return self._reuse.expected(node.uses) * (min(seconds, self._restore_seconds) if is_saved else seconds)

    def _rank(self, node: _Node, number: int, *, is_saved: bool) -> None:
        node.rank = (self._inflation.value + self._worth(node, is_saved=is_saved), number)

    def _before(self, node: _Node) -> str:
        """Return the name of the block before a block; empty where it is the first."""
        before = _block_before(node)
        return "" if before is None else before.name

    def _name(self, node: _Node) -> str:
        """Name it, and all before it."""
        unnamed: list[_Node] = []
        while not node.name and node.parent is not None:
            unnamed.append(node)
            node = node.parent
        for below in reversed(unnamed):
            if isinstance(below.key, _Activation):
                below.name, below.owners = activated(node.name, *below.key), node.owners | {below.key.digest}
            else:
                below.name = chained(node.name, below.key)
                below.owners = node.owners or frozenset([None if below.key is None else str(below.key)])
            node = below
        return node.name

    def check_integrity(self) -> None:
        """Raise AssertionError unless the tree is consistent, and exactly the blocks without a request are idle."""
        tree = list(_below(self._root))
        assert {node.block: node for node in tree if node.block >= 0} == self._nodes, (
            "the prefix cache's tree differs from its blocks"
        )
        assert all(node.children for node in tree if node.block < 0), (
            "an adapter, a salt or an activation without a prefix stays"
        )
        idle = {node for block, node in self._nodes.items() if self._allocator.references(block) == 1}
        assert idle == self._idle, "idle prefixes differ from those that no request holds"
        ends = {node for node in idle if not node.children}
        assert ends == self._ends.items(), "the blocks that can be evicted differ from the ends of idle prefixes"
        for node in self._nodes.values():
            assert _block_before(node) not in idle or node in idle, "a request holds a block, and not the one before it"

    # -- private ------------------------------------------------------------------------------------------------------

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        n = self._block_tokens
        for start in range(0, len(tokens) - n + 1, n):
            yield tuple(tokens[start : start + n])

    def _branch(self, digest: str | None, active_from: int) -> Mapping[int, _Activation]:
        """The number of the block with which an adapter's branch of the base's tree begins, and the branch's key: the
        same tokens may have the adapter active from another one of them on. Empty where it is active from the first.
        """
        if not active_from or digest is None:
            return {}
        block, offset = divmod(active_from, self._block_tokens)
        return {block: _Activation(digest, offset)}

    def _child(self, parent: _Node, key: _Key, block: int) -> _Node:
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = _Node(key, block, parent, depth=parent.depth + (block >= 0))
            if block >= 0 and node.depth % TOLD_BLOCKS == 0:
                self._untold.append(node)
        return node

    def _retain(self, node: _Node) -> None:
        self._allocator.retain_kv((node.block,))
        self._idle.discard(node)
        self._ends.discard(node)

    def _use(self, node: _Node) -> None:
        node.uses += 1
        self._reuse.used(node.uses)

    def _detach(self, node: _Node) -> None:
        """Take a node out of the tree with all below it, and with those above it that stand for nothing else."""
        while (parent := node.parent) is not None:
            del parent.children[node.key]
            if parent in self._idle and not parent.children:
                self._ends.set(parent, parent.rank)
            if parent.children or parent.block >= 0:
                return
            node = parent

    def _cut(self, node: _Node) -> None:
        """Forget a node and all below it."""
        self._detach(node)
        for each in [node, *_below(node)]:
            if each.block >= 0:
                self._drop(each)

    def _drop(self, node: _Node) -> None:
        self._idle.discard(node)
        self._ends.discard(node)
        del self._nodes[node.block]
        self._allocator.release_kv((node.block,))
        if node.name and (self.host is None or self.host.memory.block(node.name) is None):
            self._told.pop(told(node.name), None)


def _block_before(node: _Node) -> _Node | None:
    before = node.parent
    while before is not None and before.block < 0:
        before = before.parent
    return before


def _below(node: _Node) -> Iterator[_Node]:
    stack = list(node.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())

"""Many adapters on one base, in one model: each row of a batch goes through the adapter that it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from loray.adapters.peft_format import AdapterFiles, files_in_memory, write_folder
from loray.bases.checkpoint import stored_dtype
from loray.bases.quantized import dequantized
from loray.bases.registry import BaseModel
from loray.errors import ConflictError, NotFoundError, SpecError, UnsupportedError
from loray.methods import method_of
from loray.methods.attach import on_model, peft_name
from loray.methods.expert_lora import has_experts
from loray.methods.lora_module import replace_module, target_linears
from loray.methods.pairs import PairKey
from loray.methods.weights import MAGNITUDE, AdapterWeights, row_squares
from loray.spec import MLP_MODULES, AdapterSpec, DType
from loray.train.checkpoint import files_with
from loray.train.many.cohort import check_adapter
from loray.train.many.dora import scale_outputs
from loray.train.many.lora import add_lora
from loray.train.many.products import has_grouped
from loray.train.many.rows import Member, Rows, lay_out
from loray.train.many.slot_files import SlotFiles
from loray.train.many.stacks import Bucket, BucketKey
from loray.train.many.vera import add_vera
from loray.train.optimizer import OptimizerState
from loray.train.sequence import SequenceGroup


class _Shared:
    """Holds what all modules of a bank read: the rows of the pass."""

    def __init__(self, device: torch.device) -> None:
        self.rows: Rows | None = None
        self.anchor = torch.zeros((), device=device, requires_grad=True)


class BankLinear(nn.Module):
    """A linear module of the base, which adds what the adapters of a pass's rows add. Outside of a pass it is the
    base's.
    """

    def __init__(self, base_layer: nn.Linear, path: str, shared: _Shared) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._path, self._shared = path, shared
        self.initial_square_O: Tensor | None
        self.register_buffer("initial_square_O", None)  # of DoRA, from when one is added: the rows' norms

    def forward(self, x: Tensor) -> Tensor:
        rows, shared, path = self._shared.rows, self._shared, self._path
        if rows is None:
            out: Tensor = self.base_layer(x)
            return out
        # Flat, because then the output is no view of another tensor, and may be changed in place.
        x_MI = x.reshape(-1, x.shape[-1])
        if len(x_MI) != rows.num_tokens:
            raise ValueError(f"the model was given {len(x_MI)} tokens; AdapterBank.rows was told {rows.num_tokens}")
        y_MO: Tensor = self.base_layer(x_MI)
        y_MO = add_lora(y_MO, x, x_MI, rows, path, shared.anchor)
        y_MO = scale_outputs(y_MO, rows, path, self, shared.anchor)
        y_MO = add_vera(y_MO, x, x_MI, rows, path, shared.anchor)
        return y_MO.view(*x.shape[:-1], -1)


@dataclass
class _Adapter:
    """One adapter of the bank. `num_passes` counts those since its last update, of which each has its own dropout."""

    spec: Any
    bucket: Bucket
    slot: int
    seed: int
    num_updates: int = 0
    num_passes: int = 0
    slot_files: dict[torch.dtype, SlotFiles | None] = field(default_factory=dict)


class AdapterBank:
    """Owns the weights, gradients and optimizer states of adapters on one base.

        with bank.rows(["acme", "acme", "globex"], num_tokens=128):
            loss = loss_of(model(input_ids_BT))  # (3, 128)
            loss.backward()
        update(bank, [Update("acme", 1e-4, spec), Update("globex", 2e-4, spec)])

    Each adapter's gradient is what it is where it trains alone: rows do not see each other.
    """

    def __init__(self, model: Any, base: BaseModel, dtype: DType) -> None:
        """Freeze `model`, a transformers model of `base` in `dtype` without an adapter, on its device."""
        model.requires_grad_(False)
        model.config.name_or_path = base.name  # which goes into a published adapter, unlike a path of this machine
        self.model, self.base = model, base
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = model.get_input_embeddings().weight.device
        self._shared = _Shared(self._device)
        self._grouped = self._device if has_grouped(self._device, self._dtype) else None
        self._shapes: dict[str, tuple[int, int]] = {}
        self._buckets: dict[BucketKey, Bucket] = {}
        self._adapters: dict[str, _Adapter] = {}

    # -- adapters --

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def add(self, name: str, spec: AdapterSpec, *, seed: int, weights: AdapterWeights | None = None) -> None:
        """Add an adapter with the initial weights that `attach` draws from `seed`, bit for bit, or with `weights`.

        Raises UnsupportedError where it must be trained alone, and SpecError where `weights` are of another adapter.
        """
        if name in self._adapters:
            raise ConflictError(f"this bank has an adapter {name!r} already; remove it first")
        check_adapter(name, spec)
        if has_experts(self.model) and (own := {*MLP_MODULES} & {*spec.target_modules}):
            raise UnsupportedError(f"train {name} alone: {', '.join(sorted(own))} are experts of this base")
        spec = on_model(self.model, spec)
        linears = self._wrap(spec.target_modules)
        key = _key_of(spec, linears)
        if key.kind == "dora":
            for module in map(self.model.get_submodule, linears):
                if module.initial_square_O is None:
                    module.initial_square_O = row_squares(dequantized(module.base_layer))
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(key, linears, self._dtype, self._device)
        adapter = self._adapters[name] = _Adapter(spec, bucket, bucket.take(), seed)
        try:
            self._begin(name, adapter, seed)
            if weights is not None:
                self._load(name, adapter, weights)
        except BaseException:
            self.remove(name)
            raise

    def remove(self, name: str) -> None:
        """Forget an adapter. Its slot is another's from now on."""
        adapter = self._find(name)
        del self._adapters[name]
        bucket = adapter.bucket
        bucket.give_back(adapter.slot)
        if bucket.is_empty:
            del self._buckets[bucket.key]

    def _find(self, name: str) -> _Adapter:
        if (adapter := self._adapters.get(name)) is None:
            raise NotFoundError(f"this bank has no adapter {name!r}")
        return adapter

    def _wrap(self, modules: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Let the modules with these names ask the bank. Returns (O, I) of each by path, in the model's order."""
        for path, module in target_linears(self.model, tuple(modules)):
            self._shapes[path] = (module.out_features, module.in_features)
            replace_module(self.model, path, BankLinear(module, path, self._shared))
        return {
            path: self._shapes[path]
            for path, module in self.model.named_modules()
            if isinstance(module, BankLinear) and path.rpartition(".")[2] in modules
        }

    @torch.no_grad()
    def _begin(self, name: str, adapter: _Adapter, seed: int) -> None:
        """Draw the initial weights as PEFT does: A, B, and A again, for each module in the model's order."""
        bucket, spec = adapter.bucket, adapter.spec
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for tensor_name, master in bucket.named(bucket.memory.master, adapter.slot):
                if tensor_name.endswith("vera_lambda_d"):
                    master.fill_(torch.tensor(spec.d_initial, dtype=self._dtype))
            if bucket.key.kind != "vera":
                masters = self.masters(name)
                for path in bucket.paths:
                    out, width = self._shapes[path]
                    a = nn.Linear(width, bucket.key.rank, bias=False)
                    nn.Linear(bucket.key.rank, out, bias=False)
                    nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
                    masters[bucket.name(path, "a")].copy_(a.weight.to(self._dtype))
        adapter.bucket.refresh(slice(adapter.slot, adapter.slot + 1))

    @torch.no_grad()
    def _load(self, name: str, adapter: _Adapter, weights: AdapterWeights) -> None:
        """Copy `weights`, rounded to the compute dtype as `load_weights` does."""
        spec, method = adapter.spec, method_of(adapter.spec)
        if weights.method != method.stored_as:
            raise SpecError(f"{name}: the adapter to go on from is {weights.method}, and {spec.method} is trained")
        masters = {peft_name(n).removeprefix("model."): m for n, m in self.masters(name).items()}
        found = {f"{k.path}.{part}": t for k, module in weights.modules.items() for part, t in module.parts.items()}
        for path, squares_O in self._squares(adapter).items():
            part = path.removeprefix("model.").removesuffix("initial_square_O")
            if (magnitude_O := found.pop(f"{part}{MAGNITUDE}", None)) is not None:
                found[f"{part}lora_magnitude_change"] = magnitude_O.float() - squares_O.sqrt()
        if {n: m.shape for n, m in masters.items()} != {n: t.shape for n, t in found.items()}:
            raise SpecError(f"{name}: the adapter to go on from has other modules or ranks than the one to be trained")
        if differences := list(method.differences(spec, weights, self.base.config)):
            raise SpecError(f"{name}: the adapter to go on from is another one: {'; '.join(differences)}")
        if weights.norms or weights.embedding is not None:
            raise UnsupportedError(f"train {name} alone: it goes on from norms or an embedding of its own")
        for n, master in masters.items():
            master.copy_(found[n].to(self._dtype))
        adapter.bucket.refresh(slice(adapter.slot, adapter.slot + 1))

    def _squares(self, adapter: _Adapter) -> dict[str, Tensor]:
        """Return what DoRA's magnitudes are changes of, by the names of buffers; nothing for another method."""
        if adapter.bucket.key.kind != "dora":
            return {}
        return {
            f"{path}.initial_square_O": self.model.get_submodule(path).initial_square_O for path in adapter.bucket.paths
        }

    # -- passes --

    def order(self, names: Iterable[str]) -> list[str]:
        """Sort names, each once, as the rows of their adapters must lie in one pass."""
        buckets = {id(bucket): number for number, bucket in enumerate(self._buckets.values())}
        places = {name: (buckets[id(self._find(name).bucket)], self._find(name).slot) for name in names}
        return sorted(places, key=places.__getitem__)

    @contextmanager
    def rows(self, names: Sequence[str], num_tokens: int) -> Iterator[None]:
        """Inside the block the model is given a row of `num_tokens` tokens for each of `names`, the adapter's.

        Rows of one adapter are neighbours, and adapters are in `order`. It must hold for the backward pass, too, which
        adds to gradients; without gradients (torch.no_grad) nothing changes. Where the model is in training mode at the
        beginning, a block has dropout of its own: by the adapter's seed, its updates and the blocks since then.
        """
        groups = [(name, sum(1 for _ in own)) for name, own in groupby(names)]
        if [name for name, _ in groups] != self.order(names):
            raise ValueError("rows of one adapter are neighbours, and adapters are in the order of AdapterBank.order")
        members = [self._member(self._find(name), num_rows * num_tokens) for name, num_rows in groups]
        with self._as_rows(lay_out(members, self._grouped)):
            yield

    def _member(self, adapter: _Adapter, num_tokens: int) -> Member:
        spec, seed = adapter.spec, None
        if spec.dropout and self.model.training:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            key = [adapter.seed, adapter.num_updates, adapter.num_passes, rank]
            seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
            adapter.num_passes += 1
        scale = getattr(spec, "scale", 1.0)
        return Member(adapter.bucket, adapter.slot, scale, num_tokens, seed)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside the block the model is the base."""
        with self._as_rows(None):
            yield

    @contextmanager
    def _as_rows(self, rows: Rows | None) -> Iterator[None]:
        before, self._shared.rows = self._shared.rows, rows
        try:
            yield
        finally:
            self._shared.rows = before
            if rows is not None:
                rows.shared = None

    # -- what is trained --

    def masters(self, name: str) -> dict[str, Tensor]:
        """View an adapter's weights, fp32, by the names of its parameters in a model where it trains alone."""
        adapter = self._find(name)
        return dict(adapter.bucket.named(adapter.bucket.memory.master, adapter.slot))

    def gradients(self, name: str) -> dict[str, Tensor]:
        """View the sums of an adapter's gradients since its last update, fp32."""
        adapter = self._find(name)
        return dict(adapter.bucket.named(adapter.bucket.memory.gradient, adapter.slot))

    def zero_gradients(self, names: Iterable[str]) -> None:
        for name in names:
            adapter = self._find(name)
            adapter.bucket.memory.gradient[adapter.slot].zero_()

    def reduce_gradients(self, group: SequenceGroup) -> None:
        """Sum the gradients over the ranks of a sequence group. Each holds the same adapters in the same slots."""
        if group.size > 1:
            for bucket in self._buckets.values():
                dist.all_reduce(bucket.memory.gradient[: bucket.num_slots], group=group.process_group)

    def state(self, name: str) -> OptimizerState:
        """Copy an adapter's masters and moments to the CPU: what a checkpoint of its own run has."""
        adapter = self._find(name)
        bucket, memory = adapter.bucket, adapter.bucket.memory
        masters, exp_avg, exp_avg_sq = (
            {n: t.detach().to("cpu", copy=True) for n, t in bucket.named(of, adapter.slot)}
            for of in (memory.master, memory.exp_avg, memory.exp_avg_sq)
        )
        initial = {n: t.to("cpu", copy=True) for n, t in self._squares(adapter).items()}
        return OptimizerState(masters, exp_avg, exp_avg_sq, adapter.num_updates, initial)

    @torch.no_grad()
    def restore(self, name: str, state: OptimizerState) -> None:
        """Copy a state. Raises ValueError where it is of another adapter."""
        adapter = self._find(name)
        bucket, memory = adapter.bucket, adapter.bucket.memory
        for ours, theirs in zip((memory.master, memory.exp_avg, memory.exp_avg_sq), state[:3], strict=True):
            own = dict(bucket.named(ours, adapter.slot))
            if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in theirs.items()}:
                raise ValueError(f"the checkpoint trains other parameters than the adapter {name!r}")
            for n, tensor in own.items():
                tensor.copy_(theirs[n])
        own = dict(bucket.named(memory.master, adapter.slot))
        for n, ours in self._squares(adapter).items():  # of another machine they may differ in last bits
            began = (state.initial or {}).get(n, ours).to(ours.device)
            own[n.replace("initial_square_O", "lora_magnitude_change")] += began.sqrt() - ours.sqrt()
        adapter.num_updates, adapter.num_passes = state.num_updates, 0
        memory.gradient[adapter.slot].zero_()
        adapter.bucket.refresh(slice(adapter.slot, adapter.slot + 1))

    # -- what an optimizer needs --

    def place(self, name: str) -> tuple[Bucket, int]:
        adapter = self._find(name)
        return adapter.bucket, adapter.slot

    def num_updates(self, name: str) -> int:
        return self._find(name).num_updates

    def gradient_norms(self, names: Sequence[str]) -> dict[str, float]:
        """Compute the L2 norm of each adapter's gradients."""
        slots = (bucket.memory.gradient[slot] for bucket, slot in map(self.place, names))
        norms = [torch.linalg.vector_norm(gradient) for gradient in slots]
        return dict(zip(names, torch.stack(norms).tolist(), strict=True)) if norms else {}

    def count_update(self, name: str) -> None:
        """Take in that an optimizer has changed the masters of this adapter."""
        adapter = self._find(name)
        adapter.num_updates, adapter.num_passes = adapter.num_updates + 1, 0

    # -- files --

    @torch.no_grad()
    def files(self, name: str, dtype: DType | None = None) -> AdapterFiles:
        """Make the files of an adapter in PEFT's format, as its own run would, in copies.

        dtype  None: that of the base's checkpoint
        """
        adapter = self._find(name)
        return self._files(adapter, self._rounded(adapter, dtype))

    @torch.no_grad()
    def files_in_memory(self, name: str, dtype: DType | None = None) -> dict[str, bytes]:
        """Make the bytes of `files`."""
        adapter = self._find(name)
        slot = self._rounded(adapter, dtype)
        if (known := adapter.slot_files.get(slot.dtype)) is not None:
            return known.files(slot)
        made = self._files(adapter, slot)
        files = files_in_memory(made)
        if slot.dtype not in adapter.slot_files:
            adapter.slot_files[slot.dtype] = SlotFiles.of(made, files, slot)
        return files

    def _rounded(self, adapter: _Adapter, dtype: DType | None) -> Tensor:
        as_dtype = getattr(torch, dtype or stored_dtype(self.base.path))
        return adapter.bucket.memory.master[adapter.slot].to("cpu", as_dtype, copy=True)  # all at once

    def _files(self, adapter: _Adapter, slot: Tensor) -> AdapterFiles:
        return files_with(self.model, adapter.spec, dict(adapter.bucket.named(slot[None], 0)), norms=())

    def write(self, name: str, folder: Path, dtype: DType | None = None) -> None:
        """Write `files` to `folder`."""
        write_folder(folder, *self.files(name, dtype))


def _key_of(spec: Any, linears: Mapping[str, tuple[int, int]]) -> BucketKey:
    modules = tuple(sorted(spec.target_modules))
    if spec.method != "vera":
        return BucketKey("dora" if spec.method == "dora" else "lora", spec.rank, modules, spec.dropout, None)
    outs, widths = zip(*linears.values(), strict=True)
    pair = PairKey(spec.projection_prng_key, spec.rank, max(widths), max(outs))
    return BucketKey("vera", spec.rank, modules, spec.dropout, pair)

"""LoRA that begins with a part of the base's weights (PiSSA, OLoRA), as a torch module that leaves the base as it is.

PEFT takes the part out of the base: y = (W − s B₀ A₀) x + s B A x. Here W stays, and the changes of A and B are
trained, which begin at zero: y = W x + s (dB (A₀ + dA) + B₀ dA) x. That is the same function of A = A₀ + dA and
B = B₀ + dB, and so are its gradients. But its outputs begin as the base's to the last bit, a base can be sharded or
quantized, the adapter turned off is the base, and in 16 bits what is rounded is the change and not the weights that it
is a change of. It is published as LoRA of twice the rank: A' = [A; dA], B' = [dB, B₀].

Shapes: R rank, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loray.bases.quantized import dequantized, is_quantized
from loray.spec import Initialisation, LoraSpec

_ITERATIONS = 16  # of the randomised decomposition, as in PEFT's "pissa_niter_16"


def target_linears(model: nn.Module, modules: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield path and module of the linear layers with these names."""
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in modules and isinstance(module, nn.Linear):
            yield path, module


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class DecomposedLinear(nn.Module):
    """A linear module with the changes of A and B as `lora_A` and `lora_B`. `begin` sets the buffers A₀ and B₀."""

    def __init__(self, base_layer: nn.Linear, spec: LoraSpec) -> None:
        super().__init__()
        weight: Any = base_layer.weight
        dtype = base_layer.compute_dtype if is_quantized(weight) else weight.dtype
        like: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        out, width, rank = base_layer.out_features, base_layer.in_features, spec.rank
        self.base_layer = base_layer
        self.dropout = nn.Dropout(spec.dropout)
        assert spec.init is not None
        self.init: Initialisation = spec.init
        self.scale = spec.scale
        self.lora_A = nn.Linear(width, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, out, bias=False, **like)
        nn.init.zeros_(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)
        self.initial_a_RI: Tensor
        self.initial_b_OR: Tensor
        self.register_buffer("initial_a_RI", torch.zeros(rank, width, **like))
        self.register_buffer("initial_b_OR", torch.zeros(out, rank, **like))

    def begin(self, weight_OI: Tensor) -> None:
        """Decompose the base's weight."""
        a_RI, b_OR = decompose(weight_OI, self.init, self.lora_A.out_features, self.scale)
        self.initial_a_RI.copy_(a_RI)
        self.initial_b_OR.copy_(b_OR)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        x = self.dropout(x)
        change = self.lora_A(x)
        inner = change + F.linear(x, self.initial_a_RI)
        added: Tensor = self.lora_B(inner) + F.linear(change, self.initial_b_OR)
        return y + self.scale * added


def decompose(weight_OI: Tensor, init: Initialisation, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Compute A₀ (R, I) and B₀ (O, R) in fp32, as PEFT does: of PiSSA (Meng et al., 2024) the largest singular values,
    whose s B₀ A₀ is the best approximation of that rank; of OLoRA (Büyükakyüz, 2024) the first columns of a QR.

    Signs, which libraries choose as they like, are such that the largest element of each row of A₀ is positive.
    """
    weight_OI = weight_OI.detach().float()
    if init == "olora":
        q_OK, r_KI = torch.linalg.qr(weight_OI)
        a_RI, b_OR = r_KI[:rank], q_OK[:, :rank]
    else:
        if init == "pissa":
            u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
        else:
            u_OK, s_K, v_IK = torch.svd_lowrank(weight_OI, rank, niter=_ITERATIONS)
            v_KI = v_IK.T
        root_R = (s_K[:rank] / scale).sqrt()
        a_RI, b_OR = root_R[:, None] * v_KI[:rank], u_OK[:, :rank] * root_R
    largest_R1 = a_RI.gather(1, a_RI.abs().argmax(dim=1, keepdim=True))
    sign_R1 = torch.where(largest_R1 < 0, -1.0, 1.0)
    return a_RI * sign_R1, b_OR * sign_R1.T


def inject_decomposed(model: nn.Module, spec: LoraSpec) -> None:
    """Put a DecomposedLinear into every target module of `model`, and freeze all other parameters."""
    replace_linears(model, spec.target_modules, lambda module: DecomposedLinear(module, spec))


def replace_linears(model: nn.Module, modules: tuple[str, ...], make: Callable[[nn.Linear], Any]) -> None:
    """Replace every target module by what `make` makes of it, and let that begin with the base's weight. Where the
    weight has no memory of its own yet, it begins later, see `begin_all`.
    """
    model.requires_grad_(False)
    for path, module in target_linears(model, modules):
        own, weight_OI = make(module), dequantized(module)
        if weight_OI.untyped_storage().nbytes() >= weight_OI.nbytes:
            own.begin(weight_OI)
        replace_module(model, path, own)


def begin_all(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Let modules begin with the weights that `read` gives for the names of their weights."""
    for path, module in model.named_modules():
        if hasattr(module, "begin"):
            module.begin(read(f"{path}.weight"))


def published_pairs(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy `tensors`, the trained ones by PEFT's names, with A' and B' in the place of the changes, and sums rounded to
    the changes' dtype.
    """
    found = dict(tensors)
    for path, module in model.named_modules():
        if isinstance(module, DecomposedLinear):
            a_name, b_name = (f"{path}.{part}.weight" for part in ("lora_A", "lora_B"))
            da_RI, db_OR = tensors[a_name].detach().cpu(), tensors[b_name].detach().cpu()
            a_RI = (module.initial_a_RI.detach().cpu().float() + da_RI.float()).to(da_RI.dtype)
            found[a_name] = torch.cat([a_RI, da_RI])
            found[b_name] = torch.cat([db_OR, module.initial_b_OR.detach().cpu().to(db_OR.dtype)], dim=1)
    return found

"""The volume of a halo in closed form, which plans and exchanges are compared with."""

from __future__ import annotations


def closed_form_elements(group_size: int, num_kv_heads_of_half: int, head_dim: int) -> int:
    """G·d·h: elements per row that cross each boundary in one layer's forward pass, where L is a multiple of G/2."""
    return group_size * head_dim * num_kv_heads_of_half

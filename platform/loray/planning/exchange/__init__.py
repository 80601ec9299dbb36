"""What the ranks of a sequence group exchange: S2-Attn's halo, and dense attention by Ulysses or a ring."""

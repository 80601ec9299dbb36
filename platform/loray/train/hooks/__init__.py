"""Attention inside transformers' models, through their attention and mask interfaces: S2-Attn and dense."""

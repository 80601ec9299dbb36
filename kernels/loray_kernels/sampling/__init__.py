"""Choosing a token for each row of logits.

draws     masks, temperature, min-p and a draw: the reference of `Ops.sample`
choosing  rows with more than that, for backends that do all of it: changed logits, top-k, top-p, log-probabilities
"""

"""Many adapters trained in one process on one base.

bank = AdapterBank(load_model(base, dtype="bfloat16"), base, "bfloat16")
bank.add("acme", LoraSpec(rank=8), seed=0)
with bank.rows(bank.order(["acme"]), num_tokens=128): ...  # forward and backward
update(bank, [Update("acme", 1e-4, OptimizerSpec())])
"""

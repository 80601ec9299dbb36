"""The data plane: tokens go from a replica to a gateway over one connection, one frame for each step of the engine.

The gateway listens (`listener`, `inbox`), the replica connects (`connection`, `writer`). What both know of
each other is in `address` and `frames`.
"""

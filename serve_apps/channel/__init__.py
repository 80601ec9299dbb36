"""The data plane: tokens go from a replica to a gateway over one connection, one frame for each step of the engine.

The gateway listens (`listener`) and collects tokens (`inbox`). The replica dials (`connection`).
What both know of each other is in `frames`.
"""

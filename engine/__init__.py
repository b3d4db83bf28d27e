"""From a checkpoint and a list of trajectories to pictures: Darkroom's step-level engine.

The names a caller needs are in :mod:`engine.types`, :mod:`engine.errors`, :mod:`engine.ports` and
:mod:`engine.engine`. Importing this package imports no torch: gateways and routers stay light.
"""

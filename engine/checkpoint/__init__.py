"""Reads a model folder in Diffusers layout, and refuses what is unsafe, broken or unsupported.

Read :mod:`.folder` first: :class:`Checkpoint` is what the rest of the engine sees.
:mod:`.support` says which configs are served, :mod:`.files` reads JSON and weight files without
trusting them, and :mod:`.modules` is the only part that imports torch, diffusers or transformers.
"""

from __future__ import annotations

from engine.checkpoint.folder import Checkpoint, Component

__all__ = ["Checkpoint", "Component"]

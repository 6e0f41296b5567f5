"""Bilevel algorithms that take one step of θ and of φ at a time.

``SOBA`` uses one Hessian product per step, ``SABA`` one of a single batch and a memory of the
others. ``F2SA``, ``VPBGD``, ``BOME`` and ``MEHA`` use first derivatives only: each penalises the
gap ``f(θ, φ) − min_ω f(ω, φ)`` in its own way.
"""

from hypergrad.single_loop.base import Directions, LoopState, SingleLoop
from hypergrad.single_loop.penalty import BOME, F2SA, MEHA, VPBGD
from hypergrad.single_loop.saba import SABA
from hypergrad.single_loop.soba import SOBA

__all__ = ["BOME", "F2SA", "MEHA", "SABA", "SOBA", "VPBGD", "Directions", "LoopState", "SingleLoop"]

"""Bilevel algorithms that take one step of θ and of φ at a time.

``SOBA`` uses a Hessian product a step, ``SABA`` one of a single batch and a memory of the others.
``F2SA``, ``VPBGD``, ``BOME`` and ``MEHA`` use first derivatives only: they penalise the gap
``f(θ, φ) − min_ω f(ω, φ)``, and differ in how, and in ω.
"""

from hypergrad.single_loop.base import Directions, LoopState, SingleLoop
from hypergrad.single_loop.bome import BOME
from hypergrad.single_loop.f2sa import F2SA
from hypergrad.single_loop.meha import MEHA
from hypergrad.single_loop.saba import SABA
from hypergrad.single_loop.soba import SOBA
from hypergrad.single_loop.vpbgd import VPBGD

__all__ = ["BOME", "F2SA", "MEHA", "SABA", "SOBA", "VPBGD", "Directions", "LoopState", "SingleLoop"]

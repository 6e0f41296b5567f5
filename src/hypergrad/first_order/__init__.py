"""Bilevel algorithms that need no second derivative: one step of θ and φ at a time."""

from hypergrad.first_order.base import Directions, PenaltyMethod, PenaltyState
from hypergrad.first_order.bome import BOME
from hypergrad.first_order.f2sa import F2SA
from hypergrad.first_order.meha import MEHA
from hypergrad.first_order.vpbgd import VPBGD

__all__ = ["BOME", "F2SA", "MEHA", "VPBGD", "Directions", "PenaltyMethod", "PenaltyState"]

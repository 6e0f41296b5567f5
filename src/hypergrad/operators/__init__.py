"""Linear maps on trees: curvature, damping, given matrices."""

from hypergrad.operators.auto import Mode, hessian
from hypergrad.operators.base import LinearOperator, SymmetricOperator
from hypergrad.operators.gauss_newton import EmpiricalFisher, GaussNewton
from hypergrad.operators.hessians import Hessian
from hypergrad.operators.jacobians import Jacobian, Root
from hypergrad.operators.simple import Damped, Matrix, Transposed, damped

__all__ = [
    "Damped", "EmpiricalFisher", "GaussNewton", "Hessian", "Jacobian", "LinearOperator",
    "Matrix", "Mode", "Root", "SymmetricOperator", "Transposed", "damped", "hessian",
]  # fmt: skip

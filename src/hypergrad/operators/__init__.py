"""Linear maps on trees: curvature, damping, given matrices."""

from hypergrad.operators.auto import Mode, hessian
from hypergrad.operators.base import LinearOperator, SymmetricOperator
from hypergrad.operators.compiled import CompiledHessian
from hypergrad.operators.damped import Damped, damped
from hypergrad.operators.finite_difference import FiniteDifferenceHessian
from hypergrad.operators.forward import ForwardHessian
from hypergrad.operators.gauss_newton import EmpiricalFisher, GaussNewton
from hypergrad.operators.hessian import Hessian
from hypergrad.operators.jacobian import Jacobian, Root
from hypergrad.operators.matrix import Matrix
from hypergrad.operators.reverse import ReverseHessian
from hypergrad.operators.transposed import Transposed

__all__ = [
    "CompiledHessian",
    "Damped",
    "EmpiricalFisher",
    "FiniteDifferenceHessian",
    "ForwardHessian",
    "GaussNewton",
    "Hessian",
    "Jacobian",
    "LinearOperator",
    "Matrix",
    "Mode",
    "ReverseHessian",
    "Root",
    "SymmetricOperator",
    "Transposed",
    "damped",
    "hessian",
]

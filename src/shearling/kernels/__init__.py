"""Fused kernels and the plain PyTorch beside them. Triton is imported only by the modules that need it."""

from shearling.kernels.available import triton_usable
from shearling.kernels.terms import IGNORE, Divergence, Terms

__all__ = ["IGNORE", "Divergence", "Terms", "triton_usable"]

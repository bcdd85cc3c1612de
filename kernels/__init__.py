"""Fused log-probability and policy-loss kernels. Import a submodule: `from kernels import chunked`."""

__version__ = "0.0.0"  # transformers probes a PyPI package of this name and reads its version

"""Where the time and the memory of balanced steps go, and what the same work takes in plain PyTorch."""

from igb_kernels.profiling.profile import profile

__all__ = ["profile"]

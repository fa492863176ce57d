"""Loss and gradient balancing for multi-task learning in PyTorch, as fused kernels."""

from igb_kernels import gradients, losses, monitor, ops
from igb_kernels.backends import backends
from igb_kernels.balancer import Balancer
from igb_kernels.gradients import *  # noqa: F403 - every method, as its module lists them
from igb_kernels.losses import *  # noqa: F403
from igb_kernels.monitor import Monitor
from igb_kernels.profiling import profile
from igb_kernels.status import Status

__version__ = "0.1.0"

__all__ = ["Balancer", "Monitor", "Status", "backends", "gradients", "losses", "monitor", "ops", "profile"]
__all__ += gradients.__all__
__all__ += losses.__all__

"""Loss and gradient balancing for multi-task learning in PyTorch, as fused kernels."""

from igb_kernels import ops
from igb_kernels.backends import backends
from igb_kernels.balancer import Balancer
from igb_kernels.gradients import DBMTL, EMTL, IMTLG, Equal, NashMTL
from igb_kernels.losses import IMTLL, IGBv1, Log
from igb_kernels.status import Status

__version__ = "0.1.0"

__all__ = [
    "DBMTL",
    "EMTL",
    "IMTLG",
    "IMTLL",
    "Balancer",
    "Equal",
    "IGBv1",
    "Log",
    "NashMTL",
    "Status",
    "backends",
    "ops",
]

"""Loss balancing: one file per rule."""

from igb_kernels.losses.base import LossBalancer
from igb_kernels.losses.igb_v1 import IGBv1
from igb_kernels.losses.imtl_l import IMTLL
from igb_kernels.losses.log import Log
from igb_kernels.losses.unscaled import Unscaled

RULES: dict[str, type[LossBalancer]] = {
    rule.name: rule
    for rule in (
        Unscaled,
        Log,
        IGBv1,
        IMTLL,
    )
}

__all__ = [
    "IMTLL",
    "IGBv1",
    "Log",
    "LossBalancer",
    "Unscaled",
]

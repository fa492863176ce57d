"""Loss balancing: one file per rule."""

from igb_kernels.losses.base import LossBalancer
from igb_kernels.losses.dwa import DWA
from igb_kernels.losses.famo import FAMO
from igb_kernels.losses.gls import GLS
from igb_kernels.losses.igb_v1 import IGBv1
from igb_kernels.losses.igb_v2 import IGBv2
from igb_kernels.losses.imtl_l import IMTLL
from igb_kernels.losses.ldc_mtl import LDCMTL
from igb_kernels.losses.learned import LearnedLossBalancer
from igb_kernels.losses.log import Log
from igb_kernels.losses.rlw import RLW
from igb_kernels.losses.stch import STCH
from igb_kernels.losses.unscaled import Unscaled
from igb_kernels.losses.uw import UW

RULES: dict[str, type[LossBalancer]] = {
    rule.name: rule
    for rule in (
        Unscaled,
        Log,
        IGBv1,
        IGBv2,
        IMTLL,
        UW,
        RLW,
        DWA,
        GLS,
        STCH,
        FAMO,
        LDCMTL,
    )
}

__all__ = [
    "DWA",
    "FAMO",
    "GLS",
    "IMTLL",
    "LDCMTL",
    "RLW",
    "STCH",
    "UW",
    "IGBv1",
    "IGBv2",
    "LearnedLossBalancer",
    "Log",
    "LossBalancer",
    "Unscaled",
]

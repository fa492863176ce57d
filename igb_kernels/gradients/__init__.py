"""Gradient balancing: one file per method."""

from igb_kernels.gradients.aligned_mtl import AlignedMTL
from igb_kernels.gradients.base import GradientBalancer, Needs
from igb_kernels.gradients.config import ConFIG
from igb_kernels.gradients.db_mtl import DBMTL
from igb_kernels.gradients.emtl import EMTL
from igb_kernels.gradients.equal import Equal
from igb_kernels.gradients.fairgrad import FairGrad
from igb_kernels.gradients.imtl_g import IMTLG
from igb_kernels.gradients.nash_mtl import NashMTL

METHODS: dict[str, type[GradientBalancer]] = {
    method.name: method
    for method in (
        Equal,
        DBMTL,
        EMTL,
        IMTLG,
        NashMTL,
        FairGrad,
        AlignedMTL,
        ConFIG,
    )
}

__all__ = [
    "DBMTL",
    "EMTL",
    "IMTLG",
    "METHODS",
    "AlignedMTL",
    "ConFIG",
    "Equal",
    "FairGrad",
    "GradientBalancer",
    "NashMTL",
    "Needs",
]

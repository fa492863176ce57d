"""Gradient balancing: one file per method."""

from igb_kernels.gradients.base import GradientBalancer, Needs
from igb_kernels.gradients.cagrad import CAGrad
from igb_kernels.gradients.db_mtl import DBMTL
from igb_kernels.gradients.dual_proj import DualProj
from igb_kernels.gradients.emtl import EMTL
from igb_kernels.gradients.equal import Equal
from igb_kernels.gradients.imtl_g import IMTLG
from igb_kernels.gradients.mgda import MGDA
from igb_kernels.gradients.nash_mtl import NashMTL
from igb_kernels.gradients.upgrad import UPGrad

METHODS: dict[str, type[GradientBalancer]] = {
    method.name: method
    for method in (
        Equal,
        DBMTL,
        EMTL,
        IMTLG,
        NashMTL,
        MGDA,
        DualProj,
        UPGrad,
        CAGrad,
    )
}

__all__ = [
    "DBMTL",
    "EMTL",
    "IMTLG",
    "METHODS",
    "MGDA",
    "CAGrad",
    "DualProj",
    "Equal",
    "GradientBalancer",
    "NashMTL",
    "Needs",
    "UPGrad",
]

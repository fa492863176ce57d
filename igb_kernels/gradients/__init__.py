"""Gradient balancing: one file per method."""

from igb_kernels.gradients.base import GradientBalancer, Needs
from igb_kernels.gradients.db_mtl import DBMTL
from igb_kernels.gradients.emtl import EMTL
from igb_kernels.gradients.equal import Equal
from igb_kernels.gradients.grad_norm import GradNorm
from igb_kernels.gradients.gradvac import GradVac
from igb_kernels.gradients.imtl_g import IMTLG
from igb_kernels.gradients.nash_mtl import NashMTL
from igb_kernels.gradients.pcgrad import PCGrad

METHODS: dict[str, type[GradientBalancer]] = {
    method.name: method
    for method in (
        Equal,
        DBMTL,
        EMTL,
        IMTLG,
        NashMTL,
        PCGrad,
        GradVac,
        GradNorm,
    )
}

__all__ = [
    "DBMTL",
    "EMTL",
    "IMTLG",
    "METHODS",
    "Equal",
    "GradNorm",
    "GradVac",
    "GradientBalancer",
    "NashMTL",
    "Needs",
    "PCGrad",
]

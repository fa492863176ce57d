"""Gradient balancing: one file per method."""

from igb_kernels.gradients.aligned_mtl import AlignedMTL
from igb_kernels.gradients.base import GradientBalancer
from igb_kernels.gradients.cagrad import CAGrad
from igb_kernels.gradients.config import ConFIG
from igb_kernels.gradients.db_mtl import DBMTL
from igb_kernels.gradients.dual_proj import DualProj
from igb_kernels.gradients.emtl import EMTL
from igb_kernels.gradients.equal import Equal
from igb_kernels.gradients.excess_mtl import ExcessMTL
from igb_kernels.gradients.fairgrad import FairGrad
from igb_kernels.gradients.grad_drop import GradDrop
from igb_kernels.gradients.grad_norm import GradNorm
from igb_kernels.gradients.gradvac import GradVac
from igb_kernels.gradients.imtl_g import IMTLG
from igb_kernels.gradients.metabalance import MetaBalance
from igb_kernels.gradients.mgda import MGDA
from igb_kernels.gradients.moco import MoCo
from igb_kernels.gradients.modo import MoDo
from igb_kernels.gradients.nash_mtl import NashMTL
from igb_kernels.gradients.pcgrad import PCGrad
from igb_kernels.gradients.sdm_grad import SDMGrad
from igb_kernels.gradients.upgrad import UPGrad

METHODS: dict[str, type[GradientBalancer]] = {
    method.name: method
    for method in (
        Equal,
        AlignedMTL,
        CAGrad,
        ConFIG,
        DBMTL,
        DualProj,
        EMTL,
        ExcessMTL,
        FairGrad,
        GradDrop,
        GradNorm,
        GradVac,
        IMTLG,
        MetaBalance,
        MGDA,
        MoCo,
        MoDo,
        NashMTL,
        PCGrad,
        SDMGrad,
        UPGrad,
    )
}

__all__ = [
    "DBMTL",
    "EMTL",
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "Equal",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GradientBalancer",
    "MetaBalance",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "UPGrad",
]

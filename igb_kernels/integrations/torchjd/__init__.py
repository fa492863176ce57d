"""TorchJD with the fast backend, by one change of imports.

::

    from igb_kernels.integrations.torchjd import UPGrad, jac_to_grad, mtl_backward

    mtl_backward(losses, features)
    jac_to_grad(encoder.parameters(), UPGrad())

What has the name of something in `torchjd.aggregation`, `torchjd.autojac` or `torchjd.autogram` takes its arguments and
does what it does; what is not done otherwise here is TorchJD's own. Each works with the other's: our aggregators and
weightings in TorchJD's functions and in `torchjd.autogram.Engine`, and TorchJD's in ours.

- Weights are found exactly, in float64, from a Gramian that is formed in float64. TorchJD's regularise, normalise or
  iterate; `igb_kernels.integrations` says where that differs.
- What is not finite raises nothing: weights are NaN, and so is the update, which a GradScaler sees; state stays as it
  was, and `status` of the aggregator or weighting has bits of `igb_kernels.Status`.
- Nothing here is differentiable, nor does it wait for a GPU.
"""

from torchjd.aggregation import (
    PCD,
    Aggregator,
    Constant,
    ConstantWeighting,
    CRMOGMWeighting,
    ExcessMTLWeighting,
    GramianWeightedAggregator,
    Krum,
    KrumWeighting,
    Mean,
    MeanWeighting,
    PCDWeighting,
    Random,
    RandomWeighting,
    Sum,
    SumWeighting,
    TrimmedMean,
    WeightedAggregator,
    Weighting,
)
from torchjd.autogram import Engine
from torchjd.autojac import jac

from igb_kernels.integrations.torchjd._aggregation import (
    DBMTL,
    EMTL,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    ExcessMTL,
    FairGrad,
    GradDrop,
    GradVac,
    GramianAggregator,
    MethodAggregator,
    NashMTL,
    PCGrad,
    UPGrad,
)
from igb_kernels.integrations.torchjd._autojac import backward, jac_to_grad, mtl_backward
from igb_kernels.integrations.torchjd._weighting import (
    AlignedMTLWeighting,
    CAGradWeighting,
    ConeProjector,
    ConFIGWeighting,
    DualProjWeighting,
    FairGradWeighting,
    GradVacWeighting,
    IMTLGWeighting,
    MethodWeighting,
    MGDAWeighting,
    MoDoWeighting,
    NashMTLWeighting,
    PCGradWeighting,
    SDMGradWeighting,
    UPGradWeighting,
)

__all__ = [
    "DBMTL",
    "EMTL",
    "IMTLG",
    "MGDA",
    "PCD",
    "Aggregator",
    "AlignedMTL",
    "AlignedMTLWeighting",
    "CAGrad",
    "CAGradWeighting",
    "CRMOGMWeighting",
    "ConFIG",
    "ConFIGWeighting",
    "ConeProjector",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "DualProjWeighting",
    "Engine",
    "ExcessMTL",
    "ExcessMTLWeighting",
    "FairGrad",
    "FairGradWeighting",
    "GradDrop",
    "GradVac",
    "GradVacWeighting",
    "GramianAggregator",
    "GramianWeightedAggregator",
    "IMTLGWeighting",
    "Krum",
    "KrumWeighting",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "MethodAggregator",
    "MethodWeighting",
    "MoDoWeighting",
    "NashMTL",
    "NashMTLWeighting",
    "PCDWeighting",
    "PCGrad",
    "PCGradWeighting",
    "Random",
    "RandomWeighting",
    "SDMGradWeighting",
    "Sum",
    "SumWeighting",
    "TrimmedMean",
    "UPGrad",
    "UPGradWeighting",
    "WeightedAggregator",
    "Weighting",
    "backward",
    "jac",
    "jac_to_grad",
    "mtl_backward",
]

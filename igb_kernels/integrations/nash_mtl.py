"""The `methods.weight_methods` of nash-mtl (Navon et al., ICML 2022), on igb_kernels.

Its trainers run with one import changed::

    from igb_kernels.integrations.nash_mtl import METHODS, WeightMethods

Names, arguments and returned values are theirs; nothing but torch is needed. What differs is in `INTEGRATIONS.md`.
FAMO's and FairGrad's repositories have a version of it that clips gradients: see `famo` beside this module.
"""

from __future__ import annotations

from igb_kernels.integrations import _weight_methods as shared
from igb_kernels.integrations._weight_methods import (
    IMTLG,
    MGDA,
    RLW,
    STL,
    CAGrad,
    LinearScalarization,
    NashMTL,
    PCGrad,
    ScaleInvariantLinearScalarization,
    Uncertainty,
    WeightMethod,
)

__all__ = [
    "IMTLG",
    "METHODS",
    "MGDA",
    "RLW",
    "STL",
    "CAGrad",
    "DynamicWeightAverage",
    "LinearScalarization",
    "NashMTL",
    "PCGrad",
    "ScaleInvariantLinearScalarization",
    "Uncertainty",
    "WeightMethod",
    "WeightMethods",
]


class DynamicWeightAverage(shared.DynamicWeightAverage):
    """DWA, whose loss is the mean of the weighted losses here."""

    reduction = "mean"


METHODS: dict[str, type[WeightMethod]] = {
    "stl": STL,
    "ls": LinearScalarization,
    "uw": Uncertainty,
    "pcgrad": PCGrad,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "nashmtl": NashMTL,
    "scaleinvls": ScaleInvariantLinearScalarization,
    "rlw": RLW,
    "imtl": IMTLG,
    "dwa": DynamicWeightAverage,
}
"""By the names that `WeightMethods` takes."""


class WeightMethods(shared.WeightMethods):
    """One of `METHODS`::

    method = WeightMethods("nashmtl", n_tasks=3, device=device, update_weights_every=1)
    optimizer = torch.optim.Adam([{"params": model.parameters()}, {"params": method.parameters(), "lr": 0.025}])
    ...
    loss, extra_outputs = method.backward(
        losses=losses,
        shared_parameters=list(model.shared_parameters()),
        task_specific_parameters=list(model.task_specific_parameters()),
        last_shared_parameters=list(model.last_shared_parameters()),
        representation=features,
    )
    """

    methods = METHODS

"""Whose weights solve the method's own problem: ours, or those of another library.

`python -m benchmarks.differences` prints for each library that is here (nash-mtl: as AvivNavon+nash-mtl in the folder
that IGB_PEERS names) a table of residuals: how far the weights are from what defines the method, on Jacobians whose
rows differ in length by 1, 100 and 10,000. 0 is exact.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers

RATIOS = (1.0, 1e2, 1e4)
TASKS, PARAMETERS, SEEDS = 5, 40, range(4)
C, ALPHA = 0.4, 2.0
"""CAGrad's and FairGrad's arguments."""

Residual = Callable[[Tensor, Tensor], float]
"""From the Gramian [K, K] and the weights [K], float64; 0 where the weights solve the problem."""

# ---- What defines the methods ---------------------------------------------------------------------------------------


def conflict(gram: Tensor, weights: Tensor) -> float:
    """Of UPGrad and DualProj: how far the update d ascends a task, the largest −cos(g_k, d)."""
    length = (weights @ gram @ weights).clamp_min(0).sqrt()
    return max(0.0, float((-(gram @ weights) / gram.diagonal().sqrt() / length).max()))


def duality_gap(gram: Tensor, weights: Tensor) -> float:
    """Of MGDA: (|d|² − min_k g_k · d) / |d|²."""
    reached = gram @ weights
    square = float(weights @ reached)
    return (square - float(reached.min())) / square


def distance_from_max_min(gram: Tensor, weights: Tensor) -> float:
    """Of CAGrad: how far d − g0 is from the ball's surface, in radii; or how much of it helps others than the worst
    task, in what it can at most do."""
    mean = torch.full_like(weights, 1 / len(weights))
    added, reached = weights - mean, gram @ weights
    radius = C * float((mean @ gram @ mean).sqrt())
    length = float((added @ gram @ added).clamp_min(0).sqrt())
    unneeded = float((added.abs() * (reached - reached.min())).sum())
    return max(abs(length / radius - 1), unneeded / (radius * float((weights @ reached).clamp_min(0).sqrt() + radius)))


def spread_of_projections(gram: Tensor, weights: Tensor) -> float:
    """Of IMTL-G and ConFIG: how far apart the projections of d on the unit gradients are, relative to the largest."""
    projections = gram @ weights / gram.diagonal().sqrt()
    return float((projections.max() - projections.min()) / projections.abs().max())


def misfit(power: float) -> Residual:
    """Of Nash-MTL (power 1) and FairGrad (1 / alpha): the largest |w_k^power (G w)_k − 1|."""
    return lambda gram, weights: float((weights**power * (gram @ weights) - 1).abs().nan_to_num(torch.inf).max())


def misalignment(gram: Tensor, weights: Tensor) -> float:
    """Of Aligned-MTL with equal preferences: |d|² over the smallest eigenvalue times |p|², less 1."""
    wanted = float(torch.linalg.eigvalsh(gram)[0]) / len(gram)
    return abs(float(weights @ gram @ weights) / wanted - 1)


RESIDUALS: dict[str, Residual] = {
    "UPGrad": conflict,
    "DualProj": conflict,
    "MGDA": duality_gap,
    "CAGrad": distance_from_max_min,
    "IMTLG": spread_of_projections,
    "ConFIG": spread_of_projections,
    "NashMTL": misfit(1),
    "FairGrad": misfit(1 / ALPHA),
    "AlignedMTL": misalignment,
}

# ---- What they are given --------------------------------------------------------------------------------------------


def jacobian(ratio: float, seed: int) -> Tensor:
    """Rows in conflict, whose lengths go from 1 to about `ratio`, float32."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(TASKS, PARAMETERS, generator=generator)
    directions -= 0.5 * directions.mean(0)
    lengths = torch.logspace(0, float(torch.tensor(ratio).log10()), TASKS)[torch.randperm(TASKS, generator=generator)]
    return directions * lengths[:, None]


WeightsOf = Callable[[Tensor], Tensor]
"""From a Jacobian [K, D], float32; those that its updates have, in any dtype."""


def worst(residual: Residual, weights_of: WeightsOf, ratio: float) -> float:
    """The largest residual over some Jacobians with rows of this ratio of lengths."""
    found = []
    for seed in SEEDS:
        rows = jacobian(ratio, seed)
        found.append(residual(rows.double() @ rows.double().T, weights_of(rows).double()))
    return max(found)


# ---- The libraries --------------------------------------------------------------------------------------------------

Pair = tuple[WeightsOf, WeightsOf]
"""Ours and theirs."""


def torchjd() -> Mapping[str, Pair]:
    """TorchJD's aggregators as they are by default, and those of the same name and arguments here."""
    from torchjd import aggregation

    from igb_kernels.integrations import torchjd as integration

    arguments = {"CAGrad": (C,), "FairGrad": (ALPHA,), "NashMTL": (TASKS, 0.0)}

    def weights_of(library: object, name: str) -> WeightsOf:
        def weights(rows: Tensor) -> Tensor:
            aggregator = getattr(library, name)(*arguments.get(name, ()))
            if isinstance(aggregator, aggregation.WeightedAggregator):
                found: Tensor = aggregator.weighting(rows)
                return found
            return torch.linalg.lstsq(rows.double().T, aggregator(rows).double()).solution  # ConFIG's update alone

        return weights

    return {name: (weights_of(integration, name), weights_of(aggregation, name)) for name in RESIDUALS}


LIBMTL: dict[str, tuple[str, str, dict[str, object]]] = {
    "UPGrad": ("UPGrad", "upgrad", {"UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 1e-4}),
    "MGDA": ("MGDA", "mgda", {"mgda_gn": "none"}),
    "CAGrad": ("CAGrad", "cagrad", {"calpha": C, "rescale": 0}),
    "IMTLG": ("IMTL", "imtl_g", {}),
    "NashMTL": ("Nash_MTL", "nash_mtl", {"update_weights_every": 1, "optim_niter": 20, "max_norm": 0.0}),
    "FairGrad": ("FairGrad", "fairgrad", {"FairGrad_alpha": ALPHA}),
}
"""LibMTL's name, ours, and LibMTL's arguments. Its Aligned_MTL calls a function that PyTorch no longer has."""


def libmtl() -> Mapping[str, Pair]:
    """LibMTL's weightings and this package's methods, on losses whose gradients are the rows."""
    theirs, architecture = vars(peers.libmtl("weighting")), peers.libmtl("architecture").HPS
    from igb_kernels.integrations import libmtl as integration

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameter = torch.nn.Parameter(torch.zeros(PARAMETERS))

    def weights_of(weighting: type, arguments: Mapping[str, object]) -> WeightsOf:
        def weights(rows: Tensor) -> Tensor:
            names = [str(k) for k in range(TASKS)]
            model = type("Model", (architecture, weighting), {})(
                names, Shared, torch.nn.ModuleDict(), False, False, torch.device("cpu")
            )
            model.init_param()
            losses, parameter = torch.zeros(TASKS), model.encoder.parameter
            parameter.grad = torch.zeros_like(parameter)
            for k, row in enumerate(rows):
                losses[k] = row @ parameter + 1
            model.zero_grad_share_params = lambda: parameter.grad.zero_()  # LibMTL 1.1.5 relies on zeros, not None
            model.backward(losses, **arguments)
            return torch.linalg.lstsq(rows.double().T, parameter.grad.double()).solution

        return weights

    found = {}
    for name, (there, here, arguments) in LIBMTL.items():
        if there in theirs and (there != "CAGrad" or "Nash_MTL" in theirs):  # that of LibMTL 1.1.5 is for three tasks
            ours = {} if name == "UPGrad" else arguments  # exact by default
            found[name] = weights_of(integration.weighting(here), ours), weights_of(theirs[there], arguments)
    return found


def nash_mtl() -> Mapping[str, Pair]:
    """nash-mtl's methods, and those of the same name here."""
    from igb_kernels.integrations import nash_mtl as integration

    folder = peers.checkout(NASH_MTL)
    assert folder is not None, "there is one"
    with peers.importing_from(folder):
        original = importlib.import_module("methods.weight_methods")

    def weights_of(library: Any, name: str) -> WeightsOf:
        def weights(rows: Tensor) -> Tensor:
            x = torch.zeros(PARAMETERS, requires_grad=True)
            options = {"c": C} if name == "cagrad" else {}
            method = library.WeightMethods(name, n_tasks=TASKS, device=x.device, **options)
            _, outputs = method.backward(losses=rows @ x, shared_parameters=[x])
            found: Tensor
            if name == "cagrad":  # which tells none
                found = torch.linalg.lstsq(rows.double().T, x.grad.double()).solution
                return (1 + C**2) / TASKS * found
            found = torch.as_tensor(outputs["weights"]).detach()
            return found / TASKS if name == "mgda" else found

        return weights

    names = {"MGDA": "mgda", "CAGrad": "cagrad", "IMTLG": "imtl", "NashMTL": "nashmtl"}
    return {name: (weights_of(integration, theirs), weights_of(original, theirs)) for name, theirs in names.items()}


NASH_MTL = "AvivNavon/nash-mtl"
LIBRARIES: dict[str, Callable[[], Mapping[str, Pair]]] = {
    "torchjd": torchjd,
    "LibMTL": libmtl,
    "nash-mtl": nash_mtl,
}
"""The methods that both have."""


def is_here(library: str) -> bool:
    """Whether the library can be run."""
    if library == "nash-mtl":
        return peers.checkout(NASH_MTL) is not None and all(map(importlib.util.find_spec, ("cvxpy", "ecos", "scipy")))
    return importlib.util.find_spec(library) is not None


def table(library: str) -> str:
    """Methods × ratios, ours and theirs in each column."""
    lines = [f"{library + ', worst of ' + str(len(SEEDS)):24}" + "".join(f"{f'1 : {ratio:g}':>22}" for ratio in RATIOS)]
    lines += [" " * 24 + f"{'ours':>12}{'theirs':>10}" * len(RATIOS)]
    for name, (ours, theirs) in LIBRARIES[library]().items():
        pairs = [(worst(RESIDUALS[name], ours, ratio), worst(RESIDUALS[name], theirs, ratio)) for ratio in RATIOS]
        lines.append(f"{name:24}" + "".join(f"{a:12.1e}{b:10.1e}" for a, b in pairs))
    return "\n".join(lines)


def main() -> None:
    """Prints all tables that can be made here."""
    print(f"residuals of weights, {TASKS} tasks, float32 rows whose lengths differ by up to the ratio\n")
    for library in LIBRARIES:
        if not is_here(library):
            print(f"{library}: not installed\n")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(table(library), end="\n\n")


if __name__ == "__main__":
    main()

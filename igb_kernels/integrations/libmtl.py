"""LibMTL's weightings on this package's kernels, and this package's methods as weightings for LibMTL.

LibMTL's Trainer takes a weighting from `LibMTL.weighting`, by name. `install` puts ours there::

    from igb_kernels.integrations import libmtl

    libmtl.install()  # beside theirs: "igb_DB_MTL", "igb_Nash_MTL", "igb_IGBv1", ...
    libmtl.install("igb_v1+db_mtl")  # any combination, as `igb_kernels.Balancer` names it
    libmtl.install(replace=True)  # "DB_MTL" and all others are ours from here on

They take LibMTL's arguments (`weight_args`) by LibMTL's names and with its defaults. A model has its
`igb_kernels.Balancer` as `balancer`, and what the last step did as `balance_result`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from copy import copy
from types import ModuleType
from typing import Any, ClassVar

import LibMTL.config
import LibMTL.weighting
import torch
from LibMTL.weighting.abstract_weighting import AbsWeighting
from torch import Tensor

from igb_kernels._log import warn_once
from igb_kernels.balancer import Balancer
from igb_kernels.gradients import METHODS, MGDA, Equal, GradientBalancer, GradNorm, MoDo, NashMTL
from igb_kernels.losses import DWA, RULES, LearnedLossBalancer, LossBalancer
from igb_kernels.result import BalanceResult

LIBMTL: dict[str, tuple[str, dict[str, object]]] = {
    "EW": ("equal", {}),
    "UW": ("uw", {"initial": -0.5}),
    "DWA": ("dwa", {}),
    "RLW": ("rlw", {}),
    "GLS": ("gls", {}),
    "STCH": ("stch", {"nadir_epoch": 4}),
    "FAMO": ("famo", {}),
    "IMTL": ("imtl_l+imtl_g", {}),
    "MGDA": ("mgda", {}),
    "CAGrad": ("cagrad", {"rescale": 1}),
    "PCGrad": ("pcgrad", {"visit_self": True, "eps": 1e-8}),
    "GradVac": ("gradvac", {"eps": 1e-8}),
    "GradDrop": ("grad_drop", {"leak": 0.0}),
    "GradNorm": ("grad_norm", {}),
    "Nash_MTL": ("nash_mtl", {}),
    "MoCo": ("moco", {"parity": "libmtl"}),
    "Aligned_MTL": ("aligned_mtl", {"preference": 1.0}),
    "DB_MTL": ("db_mtl", {}),
    "ExcessMTL": ("excess_mtl", {}),
    "FairGrad": ("fairgrad", {}),
    "MoDo": ("modo", {"gamma": 1e-3, "rho": 0.1}),
    "SDMGrad": ("sdm_grad", {"eps": 1e-8}),
    "UPGrad": ("upgrad", {"reg_eps": 1e-4}),
}
"""LibMTL's weightings: what they are here, and the options with which that is LibMTL's at its default arguments."""

ARGUMENTS: dict[str, dict[str, str | None]] = {
    "dwa": {"T": "temperature"},
    "stch": {"STCH_mu": "mu", "STCH_warmup_epoch": "nadir_epoch"},
    "famo": {"FAMO_w_lr": "lr", "FAMO_w_gamma": "gamma"},
    "mgda": {"mgda_gn": "normalization"},
    "cagrad": {"calpha": "c"},
    "gradvac": {"GradVac_beta": "beta"},
    "nash_mtl": {"update_weights_every": "update_every", "optim_niter": None},
    "moco": {
        "MoCo_beta": "beta",
        "MoCo_beta_sigma": "beta_sigma",
        "MoCo_gamma": "gamma",
        "MoCo_gamma_sigma": "gamma_sigma",
        "MoCo_rho": "rho",
    },
    "db_mtl": {"DB_beta": "beta", "DB_beta_sigma": "sigma"},
    "excess_mtl": {"robust_step_size": "eta"},
    "fairgrad": {"FairGrad_alpha": "alpha"},
    "modo": {"MoDo_gamma": "gamma", "MoDo_rho": "rho"},
    "sdm_grad": {"SDMGrad_lamda": "lam", "SDMGrad_niter": "iterations"},
    "upgrad": {"UPGrad_reg_eps": "reg_eps", "UPGrad_norm_eps": None},
}
"""LibMTL's arguments by their names here, where these are others; None: they tune a solver that here is exact."""

ONE_VALUE: dict[str, dict[str, object]] = {"rlw": {"dist": "Normal"}, "gradvac": {"GradVac_group_type": 0}}
"""LibMTL's arguments of which one value is known here."""

WEIGHTED_HEADS = ("nash_mtl", "fairgrad", "excess_mtl")
"""Methods with which LibMTL weights the losses; with the others, the shared parameters' gradients alone."""
NOT_AT_REPRESENTATIONS = ("db_mtl", "moco", "modo", "sdm_grad", "grad_drop")

Part = type[LossBalancer] | type[GradientBalancer]


def weighting(name: str, **options: object) -> type[Weighting]:
    """A weighting class for LibMTL's Trainer.

    Args:
        name: LibMTL's ("DB_MTL"), with LibMTL's defaults; or one as for `igb_kernels.Balancer`, with this package's:
            "db_mtl", "igb_v1" or "igb_v1+db_mtl".
        options: of the method and the rule, by their names here or in LibMTL. The Trainer's `weight_args` go before
            them.

    Raises:
        ValueError: for a name that is not known.
        TypeError: for an option that neither the method nor the rule has, or both.
    """
    known, defaults = LIBMTL.get(name, (name, {}))
    *rules, method = known.split("+")
    if not rules and method in RULES:
        rules, method = [method], "equal"
    if method not in METHODS or len(rules) > 1 or not set(rules) <= set(RULES):
        raise ValueError(
            f'name must be one of LibMTL\'s {sorted(LIBMTL)}, or "method", "rule" or "rule+method" of the methods '
            f"{sorted(METHODS)} and the rules {sorted(RULES)}; found {name!r}"
        )
    contents = {
        "__doc__": f"`{known}` of igb_kernels as a weighting of LibMTL.",
        "__module__": __name__,
        "rule": RULES[rules[0]] if rules else None,
        "method": METHODS[method],
        "options": {**defaults, **options},
    }
    cls: type[Weighting] = type(f"igb_{name}" if name in LIBMTL else name, (Weighting,), contents)
    cls.options_of_parts({})
    return cls


def install(*names: str, replace: bool | Iterable[str] = False) -> dict[str, type[Weighting]]:
    """Makes weightings of this package known to LibMTL in this process; `uninstall` takes it back.

    Every method and rule goes by "igb_" and its name in LibMTL or, where that has none, its class's here:
    "igb_DB_MTL", "igb_IGBv1". `LibMTL.config.prepare_args` reads their arguments, too.

    LibMTL's Trainer knows some names: it tells "FAMO" the losses after a step, and samples three batches for "MoDo" and
    "SDMGrad". Replace these; under other names they have to do without.

    Args:
        names: further ones as for `weighting`, to be known by these very names: "igb_v1+db_mtl".
        replace: weightings of LibMTL to replace, by LibMTL's names; True: all that the installed LibMTL has, except
            GradDrop, which there is of representations, and here of parameters.

    Returns:
        What has been made known, by name.

    Raises:
        ValueError: for a name that is not known. Nothing is changed then.
    """
    if isinstance(replace, bool):
        theirs = [name for name in LIBMTL if name in vars(LibMTL.weighting) and name != "GradDrop"] if replace else []
    else:
        theirs = list(replace)
    if unknown := [name for name in theirs if name not in LIBMTL]:
        raise ValueError(f"replace must name weightings of LibMTL, {sorted(LIBMTL)}; found {unknown}")
    known = {f"igb_{name}": weighting(name) for name in LIBMTL}
    in_libmtl = {entry for entry, _ in LIBMTL.values()} | {"none"}
    ours: list[Part] = [*METHODS.values(), *RULES.values()]
    known |= {f"igb_{part.__name__}": weighting(part.name) for part in ours if part.name not in in_libmtl}
    known |= {name: weighting(name) for name in (*names, *theirs)}
    for name, cls in known.items():
        _put(LibMTL.weighting, name, cls)
    _put(LibMTL.config, "prepare_args", _prepare_args)
    return known


def uninstall() -> None:
    """Takes back what `install` has done."""
    while _originals:
        (module, name), original = _originals.popitem()
        if original is None:
            delattr(module, name)
        else:
            setattr(module, name, original)


_originals: dict[tuple[ModuleType, str], Any] = {}
"""What was there before `install`; None: nothing."""


def _put(module: ModuleType, name: str, value: object) -> None:
    _originals.setdefault((module, name), vars(module).get(name))
    setattr(module, name, value)


def _prepare_args(params: Any) -> Any:
    """LibMTL's `prepare_args`, which knows LibMTL's weightings alone, of the one that has the same arguments."""
    cls = vars(LibMTL.weighting).get(params.weighting)
    if isinstance(cls, type) and issubclass(cls, Weighting):
        params = copy(params)
        params.weighting = cls.of_libmtl()
    return _originals[LibMTL.config, "prepare_args"](params)


class Weighting(AbsWeighting):
    """A method and a rule of this package behind LibMTL's protocol; `weighting` makes its subclasses."""

    rule: ClassVar[type[LossBalancer] | None]
    """None: the one that is part of the method."""
    method: ClassVar[type[GradientBalancer]]
    options: ClassVar[Mapping[str, object]]

    balancer: Balancer | None
    """None before the first step."""
    balance_result: BalanceResult | None
    """What the last step did."""

    def __init__(self) -> None:
        super().__init__()
        self.balancer = self.balance_result = None
        self._made_for: tuple[object, ...] = ()
        self._max_norm = 0.0
        self._epochs_told = 0
        self._shift: Tensor | None = None
        """Added to all representations of a batch, so that its gradient is the sum of theirs; 0."""

    @classmethod
    def of_libmtl(cls) -> str:
        """The weighting of the installed LibMTL that takes this one's arguments; else "EW", which takes none."""
        for part in (cls.method, cls.rule):
            for name, (known, _) in LIBMTL.items():
                there = _originals.get((LibMTL.weighting, name), vars(LibMTL.weighting).get(name))
                if part is not None and part.name in known.split("+") and there is not None:
                    return name
        return "EW"

    @classmethod
    def options_of_parts(cls, weight_args: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of the rule and of the method, by their names here."""
        options: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for name, value in {**cls.options, **weight_args}.items():
            owners, late = 0, {"initial"} & weight_args.keys()  # the learned parameters are there already
            for part, found in zip((cls.rule, cls.method), options, strict=True):
                if part is None:
                    continue
                here, one_value = ARGUMENTS.get(part.name, {}).get(name, name), ONE_VALUE.get(part.name, {})
                if name in one_value and value != one_value[name]:
                    raise ValueError(f"{name} must be {one_value[name]!r} with igb_kernels, found {value!r}")
                if here is not None and here in _options(part) - late:
                    found[here] = value
                    owners += 1
                owners += here is None or name in one_value
            if owners != 1:
                parts = " and ".join(part.__name__ for part in (cls.rule, cls.method) if part is not None)
                problem = "both have it" if owners else f"found {name!r}"
                raise TypeError(f"weight_args must be arguments of {parts}, each of one of them: {problem}")
        return options

    # ---- The protocol -------------------------------------------------------------------------------------------

    def init_param(self) -> None:
        """Makes the learned parameters. As with LibMTL, the optimizer and checkpoints have them as `loss_scale`."""
        for part, options in zip((self.rule, self.method), self.options_of_parts({}), strict=True):
            if part is not None and _is_learned(part):
                parameter = self._with_parameter(part, options).parameter
                if part is GradNorm:
                    torch.nn.init.ones_(parameter)
                setattr(self, self._name_of(part), parameter)

    def backward(self, losses: Tensor, **weight_args: object) -> Any:
        """Adds the balanced gradients to `.grad`.

        Args:
            losses: of the tasks, [K]; with MoDo and SDMGrad also of three batches, [3, K].
            weight_args: arguments of the method and the rule, by their names in LibMTL or here.

        Returns:
            The method's weights, or without a method the rule's scales: a NumPy array [K]. This waits for the device.

        Raises:
            TypeError: for an argument that neither the method nor the rule has.
            ValueError: for one out of range, or a method that cannot compare representations where `rep_grad` is set.
        """
        if self.rep_grad:
            result = self._at_representations(losses, weight_args)
        elif self.method.crosses and losses.dim() == 2:
            result = self._of_three_batches(losses, weight_args)
        else:
            if self.method.crosses:
                warn_once(
                    f"LibMTL samples one batch for {self.method.name}, whose noise then biases the weights: it samples "
                    'three for the names "MoDo" and "SDMGrad", as after install(replace=True)'
                )
            result = self._balancer(weight_args).backward(losses)
        if self._max_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.get_share_params(), self._max_norm)
        self.balance_result = result
        assert self.balancer is not None, "it has made the step"
        weights = result.scales if isinstance(self.balancer.gradients, Equal) else result.weights
        return weights.cpu().numpy()

    def update_w(self, curr_losses: Tensor) -> None:
        """Tells FAMO the losses [K] after the optimizer's step."""
        if self.balancer is None:
            raise RuntimeError("update_w comes after backward, which has not been called")
        self.balancer.after_step(curr_losses)

    # ---- The balancer -------------------------------------------------------------------------------------------

    def _balancer(self, weight_args: Mapping[str, object]) -> Balancer:
        """The balancer, in the epoch that the Trainer is in; made anew, with its state, where the arguments change."""
        epoch = getattr(self, "epoch", None)
        waits = self.method is GradNorm and self.rule is None and epoch == 0
        made_for = (dict(weight_args), waits, None if self._shift is None else self._shift.shape)
        if self.balancer is None or made_for != self._made_for:
            made = self._made(weight_args, Equal if waits else self.method)
            if self.balancer is not None and type(made.gradients) is type(self.balancer.gradients):
                made.load_state_dict(self.balancer.state_dict())
            self.balancer, self._made_for = made, made_for
        if epoch is not None and epoch != self._epochs_told:
            for _ in range(self._epochs_told, epoch):
                self.balancer.end_epoch()
            self._epochs_told = epoch
            if isinstance(self.balancer.losses, _ToldDWA) and hasattr(self, "train_loss_buffer"):
                self.balancer.losses.tell(self.train_loss_buffer[:, max(epoch - 2, 0) : epoch], self.device)
        return self.balancer

    def _made(self, weight_args: Mapping[str, object], method: type[GradientBalancer]) -> Balancer:
        of_rule, of_method = self.options_of_parts(weight_args)
        for options in (of_rule, of_method):
            for name in ("preference", "leak"):
                if isinstance(options.get(name), float | int):
                    options[name] = [options[name]] * self.task_num
        if self.method is GradNorm and hasattr(self, "train_loss_buffer"):
            of_method.setdefault("initial_losses", self.train_loss_buffer[:, 0] if self.rule is None else "epoch")
        if self.method is MGDA and self.rep_grad:
            of_method.setdefault("apply_to", "raw")
        gradients = Equal() if method is Equal else self._with_parameter(method, of_method)
        rule = None
        if self.rule is not None:
            rule = self._with_parameter(_ToldDWA if self.rule is DWA else self.rule, of_rule)
        if isinstance(gradients, NashMTL):  # LibMTL clips what the shared parameters get, and nothing else
            self._max_norm, gradients.max_norm = gradients.max_norm, 0.0
        heads: dict[str, Any] = {}
        if self.method.name in WEIGHTED_HEADS and not self.rep_grad and (own := self._own_parameters()):
            heads = {"heads": "weighted", "task_parameters": own}
        shared = [self._shift] if self._shift is not None else list(self.get_share_params())
        return Balancer(gradients, rule, shared=shared, tasks=list(self.task_name), **heads)

    def _with_parameter(self, part: Any, options: Mapping[str, Any]) -> Any:
        """The part, with the model's learned parameter where it has one."""
        if not _is_learned(part):
            return part(**options)
        made = part(num_tasks=self.task_num, device=self.device, **options)
        made.parameter = getattr(self, self._name_of(part), made.parameter)
        return made

    def _name_of(self, part: Part) -> str:
        """Of the learned parameter."""
        other = part is self.method and self.rule is not None and issubclass(self.rule, LearnedLossBalancer)
        return "grad_scale" if other else "loss_scale"

    def _own_parameters(self) -> list[Tensor]:
        """The task-specific parameters."""
        others = {id(p) for p in self.get_share_params()}
        others |= {id(getattr(self, name, None)) for name in ("loss_scale", "grad_scale")}
        return [p for p in self.parameters() if id(p) not in others]

    # ---- Other kinds of steps -----------------------------------------------------------------------------------

    def _of_three_batches(self, losses: Tensor, weight_args: Mapping[str, object]) -> BalanceResult:
        """Weights from two of the batches; the heads learn from all three, as in LibMTL."""
        order = (2, 0, 1) if self.method is MoDo else (0, 1, 2)
        first, *others = (losses[i] for i in order)
        result = self._balancer(weight_args).backward(first, independent=others, retain_graph=True)
        if own := [p for p in self._own_parameters() if p.requires_grad]:
            torch.autograd.backward([batch.sum() for batch in others], inputs=own)
            for p in own if self.method is MoDo else []:
                if p.grad is not None:
                    p.grad /= len(order)
        return result

    def _at_representations(self, losses: Tensor, weight_args: Mapping[str, object]) -> BalanceResult:
        """Tasks are compared by the gradients of their representations, summed over the batch, as in LibMTL.

        That is what a shift of all representations would get as its gradient: the step is balanced for one that is 0.
        """
        if self.method.name in NOT_AT_REPRESENTATIONS:
            raise ValueError(f"rep_grad must be False for {self.method.name}, which takes parameters' gradients")
        copies = [self.rep_tasks[task] for task in self.task_name]
        found = torch.autograd.grad(losses.sum(), copies, retain_graph=True, allow_unused=True)
        grads = [torch.zeros_like(z) if grad is None else grad for z, grad in zip(copies, found, strict=True)]
        rows = [grad.sum(dim=0).flatten() for grad in grads]
        if len({row.shape for row in rows}) > 1:
            shapes = [tuple(z.shape[1:]) for z in copies]
            raise ValueError(f"representations must be of one size for all tasks with rep_grad, found {shapes}")
        if self._shift is None or self._shift.shape != rows[0].shape:
            self._shift = torch.zeros_like(rows[0]).requires_grad_()
        balancer = self._balancer(weight_args)
        shifted = [loss + row @ self._shift for loss, row in zip(losses.detach(), rows, strict=True)]
        result, self._shift.grad = balancer.backward(shifted), None
        total = result.total_weights
        weighted = [grad * weight.to(grad.dtype) for grad, weight in zip(grads, total, strict=True)]
        behind: dict[str, Any] = self.rep if isinstance(self.rep, dict) else dict.fromkeys(self.task_name, self.rep)
        reached = [k for k, task in enumerate(self.task_name) if behind[task].requires_grad]
        if reached:
            torch.autograd.backward([behind[self.task_name[k]] for k in reached], [weighted[k] for k in reached])
        if own := [p for p in self._own_parameters() if p.requires_grad]:
            seeds = total if self.method.name in WEIGHTED_HEADS else result.scales
            torch.autograd.backward(losses, seeds.to(losses.dtype), inputs=own)
        return result


def _options(part: Part) -> set[str]:
    """What the constructor takes from a user."""
    return set(inspect.signature(part).parameters) - {"num_tasks", "device", "dtype"}


def _is_learned(part: Part) -> bool:
    """Whether it has a parameter for each task."""
    return "num_tasks" in inspect.signature(part).parameters


class _ToldDWA(DWA):
    """DWA from the epochs' mean losses as the Trainer has them, weighted by batch sizes."""

    _told: Tensor | None = None

    def tell(self, means: Any, device: torch.device) -> None:
        """The mean losses of the last two epochs, a NumPy array [K, 2], or of fewer."""
        told = torch.as_tensor(means.T, dtype=torch.float64)
        if self.window is None:
            self._told = (told if len(told) == 2 else told.new_full((2, told.shape[1]), torch.nan)).to(device)

    def per_task(self) -> Tensor | None:
        return super().per_task() if self._told is None else self.of_step(self._told)

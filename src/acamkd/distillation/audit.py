"""Whether the distillation reaches the student: checked in the first steps."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn

from acamkd.distillation.split_backward import backward_scale, upstream_leaves
from acamkd.errors import AcamkdError
from acamkd.processes import is_distributed

log = logging.getLogger(__name__)

AUDITED_STEPS = 20


class Audit:
    """Checks in the first steps whether the distillation reaches what it should; all processes find the same."""

    def __init__(self) -> None:
        self._steps = 0
        self._seen: tuple[int, int] | None = None
        """Number of the last step, and how often its weights had been changed."""
        self._is_zero: dict[str, bool] = {}
        self._unreached: dict[str, nn.Parameter] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether it has seen a step."""
        return self._steps > 0

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more to find out."""
        return self._steps == AUDITED_STEPS or (self._unreached == {} and not any(self._is_zero.values()))

    def __call__(
        self, net: nn.Module, maps: Mapping[str, Tensor], terms: Mapping[str, Mapping[str, Tensor]], step: int
    ) -> None:
        """Judge one batch; raises AcamkdError at the last step where nothing, or not everything, was reached.

        The batches that a step accumulates count as one: until it is done, layers that start at zero pass nothing on.
        """
        if self._unreached is None:
            self._unreached = parameters_below(net, maps)
        self._is_zero = dict.fromkeys(terms, True) | self._is_zero
        if self.has_ended:
            return
        seen = (step, sum(parameter._version for parameter in net.parameters()))  # own loops may not number their steps
        self._steps += seen != self._seen
        self._seen = seen
        nothing = torch.zeros((), device=next(iter(maps.values())).device)
        losses = {key: sum(of_loss.values(), nothing) for key, of_loss in terms.items()}
        names, total = list(self._unreached), torch.stack(list(losses.values())).sum()
        gradients: Sequence[Tensor | None] = [None] * len(names)
        if names and total.requires_grad:
            scaled, parameters = backward_scale(maps.values()) * total, list(self._unreached.values())
            gradients = torch.autograd.grad(scaled, parameters, retain_graph=True, allow_unused=True)
        arrived = _anywhere(
            [
                *(bool(loss.isfinite() & (loss != 0)) for loss in losses.values()),
                *(x is not None and bool((x.isfinite() & (x != 0)).any()) for x in gradients),
            ],
            total.device,
        )
        for name, has_arrived in zip([*losses, *names], arrived, strict=True):
            if has_arrived and name in losses:
                self._is_zero[name] = False
            elif has_arrived:
                del self._unreached[name]
        if self._steps == AUDITED_STEPS:
            self._conclude(self._unreached)

    def _conclude(self, unreached: Iterable[str]) -> None:
        zero = [key for key, is_zero in self._is_zero.items() if is_zero]
        advice = "check that teacher and student differ and that the loss weights are not 0"
        if len(zero) == len(self._is_zero):
            raise AcamkdError(
                f"the distillation total was exactly 0 in each of the first {AUDITED_STEPS} steps: {advice}"
            )
        if zero:
            log.warning("in each of the first %d steps %s was exactly 0: %s", AUDITED_STEPS, ", ".join(zero), advice)
        if names := list(unreached):
            raise AcamkdError(
                f"in the first {AUDITED_STEPS} steps no distillation gradient reached {len(names)} student parameters "
                f"below the tapped layers: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}; "
                "tap a layer behind them, or freeze them if they are meant to stay; and leave out feature maps of a "
                "single location, which some losses cannot learn from"
            )


def parameters_below(net: nn.Module, maps: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The student's parameters that some of its feature maps depend on; raises AcamkdError if there are none."""
    below = {id(parameter) for parameter in upstream_leaves(x.grad_fn for x in maps.values())[0]}
    found = {name: parameter for name, parameter in net.named_parameters() if id(parameter) in below}
    nothing = "no trainable student parameter lies below %s: nothing can be distilled there"
    if not found:
        raise AcamkdError(nothing % ", ".join(maps) + " (an activation checkpoint around it needs use_reentrant=False)")
    if frozen := [name for name, x in maps.items() if x.grad_fn is None]:
        log.warning(nothing, ", ".join(frozen))
    return found


def _anywhere(found: Sequence[bool], device: torch.device) -> list[bool]:
    """Entry by entry, whether it holds in any of the processes that train together."""
    if not is_distributed():
        return list(found)
    held = torch.tensor(found, dtype=torch.uint8, device=device)
    distributed.all_reduce(held, distributed.ReduceOp.MAX)
    return held.bool().tolist()

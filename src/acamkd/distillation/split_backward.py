"""The autograd graph: what lies below a tensor, and a backward in two parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from acamkd.errors import AcamkdError

HALF_SCALE = 2.0**10
"""Factor of the loss while its gradients pass float16, where a pixel's share of a mean over a batch would be 0."""


def upstream_leaves(start: Iterable[Node | None], stop: Iterable[GradientEdge] = ()) -> tuple[list[Tensor], bool]:
    """The trained tensors, parameters as a rule, that what some nodes give was computed from.

    Args:
        start: The nodes, `grad_fn` of tensors.
        stop: What is not passed through when it is met on the way.

    Returns:
        The trained tensors, and whether any of `stop` was met.
    """
    ends = {(edge.node, edge.output_nr) for edge in stop}
    found: dict[int, Tensor] = {}
    met = False
    seen: set[Any] = set()
    pending = list(start)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        for edge in node.next_functions:
            if edge in ends:
                met = True
            else:
                pending.append(edge[0])
    return list(found.values()), met


def backward_scale(maps: Iterable[Tensor]) -> float:
    """What a loss over some feature maps is multiplied by for its backward: HALF_SCALE in float16, otherwise 1."""
    types = {(x.dtype, x.device.type) for x in maps}
    casts = {torch.get_autocast_dtype(device) for _, device in types if torch.is_autocast_enabled(device)}
    return HALF_SCALE if torch.float16 in casts | {dtype for dtype, _ in types} else 1.0


def split_backward(
    terms: Mapping[str, Tensor],
    maps: Sequence[Tensor],
    continuation_edges: Sequence[GradientEdge],
    *,
    check: bool = True,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients of a loss at feature maps that it was computed from, without repeating that work in its backward.

    Args:
        terms: Scalars; the loss is their sum.
        maps: Each with a graph.
        continuation_edges: Of each, the edge of the copy that the rest of the network continues from. One feature map
            may be computed from another, as P6 is from P5, if not by way of a copy.
        check: Whether the backward looks at the terms' factors, for which the program waits for a GPU.

    Returns:
        The gradients, those of float16 as float32; and terms whose backward starts at the feature maps, from the
        gradients found here.

        The terms stay as they were, and their backward repeats the work, in three cases. Another way leads around the
        copies, or from one of them to another. Hooks would change a gradient twice. Or it is float16, whose gradients
        need the factor that the loss is to be given later.
    """
    total = torch.stack(list(terms.values())).sum()
    device, scale = total.device.type, backward_scale(maps)
    half = scale != 1
    above, _ = upstream_leaves([total.grad_fn], stop=continuation_edges)
    below, _ = upstream_leaves(x.grad_fn for x in maps)
    _, nested = upstream_leaves((edge.node for edge in continuation_edges), stop=continuation_edges)
    around = {id(leaf) for leaf in above} & {id(leaf) for leaf in (*below, *maps)}
    hooked = any(leaf._backward_hooks for leaf in above)
    with torch.autocast(device, enabled=False):  # a backward runs without, and rounds nothing more than its forward did
        if half or nested or around or hooked:
            gradients = torch.autograd.grad(scale * total, maps, retain_graph=True, materialize_grads=True)
            return [gradient.float() / scale if half else gradient for gradient in gradients], dict(terms)
        edges = [*continuation_edges, *map(get_gradient_edge, above)]
        found = torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)
        direct = [torch.zeros_like(x) if g is None else g for x, g in zip((*maps, *above), found, strict=True)]
        gradients = torch.autograd.grad(maps, maps, direct[: len(maps)], retain_graph=True)  # by way of other ones too
    before = torch.stack([term.detach() for term in terms.values()])
    values = _Differentiated.apply(before, direct, check, *maps, *above)
    return list(gradients), {name: value.clone() for name, value in zip(terms, values, strict=True)}


class _Differentiated(torch.autograd.Function):
    """Values of terms, with the gradients that their sum was found to have."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradients: Sequence[Tensor], check: bool, *inputs: Tensor) -> Tensor:
        ctx.gradients, ctx.check = gradients, check
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.check and not torch.allclose(factors, factors[0], rtol=1e-4, atol=0, equal_nan=True):
            raise AcamkdError(
                "the task's terms have unequal factors, but masks that look ahead have differentiated their sum: give "
                "all terms of a Distiller's task the same factor, or none"
            )
        return None, None, None, *(factors[0] * gradient for gradient in ctx.gradients)


@contextmanager
def explaining_checkpoints() -> Iterator[None]:
    """Say what is to be done where an activation checkpoint has no graph to differentiate."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise AcamkdError(
            "the student has an activation checkpoint with use_reentrant=True, which gives no gradient at tapped maps: "
            "set use_reentrant=False, torch's advice for every checkpoint"
        ) from error

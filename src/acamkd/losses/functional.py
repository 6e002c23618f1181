"""Pure functions that more than one method uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)


def check_choices(constructor: Callable[..., None], **given: object) -> None:
    """Refuse values of options that the constructor's own annotations, `option: Literal[...]`, do not allow."""
    annotations = get_type_hints(constructor)
    for option, value in given.items():
        allowed = get_args(annotations[option])
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def resample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bring a feature map to another spatial size: (N, C, H, W) -> (N, C, *size).

    Area averaging where every side shrinks, since bilinear sampling would skip locations; bilinear otherwise.
    """
    height, width = size
    if x.shape[-2:] == (height, width):
        return x
    if height <= x.shape[-2] and width <= x.shape[-1]:
        return F.adaptive_avg_pool2d(x, (height, width))
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on this tensor's device, within; some devices have none (meta)."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def align_layer(student_channels: int, teacher_channels: int, align: bool = False) -> nn.Module:
    """The student's projection to the teacher's channels, (N, C_s, H, W) -> (N, C_t, H, W).

    A 1x1 convolution with bias where the channels differ or `align` asks for one, the identity otherwise.
    """
    if student_channels == teacher_channels and not align:
        return nn.Identity()
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient whose non-negative denominator is clamped away from zero, to 1e-31 in float32.

    The smallest normal number would do for the quotient but not for its gradient, quotient / denominator.
    """
    limits = torch.finfo(denominator.dtype)
    return numerator / denominator.clamp_min(limits.tiny / limits.eps)


def varies(deviation: Tensor, mean: Tensor) -> Tensor:
    """Whether values of this standard deviation and mean are more than a constant and its rounding.

    A quotient by the deviation of a constant is rounding, and its gradient so large that float16 cannot hold it.
    """
    return deviation > 8 * torch.finfo(mean.dtype).eps * mean.abs()


def standardize(x: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 per channel over the whole batch, (N, C, ...) -> (N, C, ...).

    The standard deviation is the unbiased one. 1e-6 is added to it, as in the code of PKD's authors. A constant channel
    becomes 0 and receives no gradient.

    Raises:
        ValueError: A channel has a single value.
    """
    centered, _, scale = center(x)
    return centered * scale


def center(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `standardize` is made of: x without its mean, each channel's standard deviation, and its scale."""
    others = [0, *range(2, x.ndim)]
    values = x.numel() // x.shape[1]
    if values == 1:
        raise ValueError(
            f"a feature map of {tuple(x.shape)} has a single value per channel, and so no standard deviation: take a "
            "larger batch or larger images, or leave this layer out"
        )
    mean = x.mean(dim=others, keepdim=True)
    centered = x - mean
    # The norm takes a third of the time of `std`, which computes the mean again.
    deviation: Tensor = torch.linalg.vector_norm(centered, dim=others, keepdim=True) * (values - 1) ** -0.5
    return centered, deviation, torch.where(varies(deviation, mean), (deviation + 1e-6).reciprocal(), 0)


def distribution_error(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) of the distributions along one dimension, which is summed away."""
    target = (teacher / temperature).softmax(dim)
    divergence = F.kl_div((student / temperature).log_softmax(dim), target, reduction="none").sum(dim)
    return temperature**2 * divergence


def pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Pearson correlation of two tensors of one shape along `dim`, which is reduced.

    Where one is constant it is 0 without gradient.
    """
    means = x.mean(dim, keepdim=True), y.mean(dim, keepdim=True)
    x, y = x - means[0], y - means[1]
    norms = torch.linalg.vector_norm(x, dim=dim), torch.linalg.vector_norm(y, dim=dim)
    both = [varies(norm * x.shape[dim] ** -0.5, mean.squeeze(dim)) for norm, mean in zip(norms, means, strict=True)]
    return torch.where(both[0] & both[1], (x * y).sum(dim) / (norms[0] * norms[1] + 1e-8), 0)


def masked_error(error: Tensor, mask: Tensor) -> Tensor:
    """Errors under masks, sum_k M_k^2 e_k / sum_k M_k.

    With e the squared difference averaged over locations this is sum_{k,p} (M_k d_{k,p})^2 / (HW sum_k M_k), and
    likewise for locations: no (N, M, C, H, W) tensor exists.

    Args:
        error: e, (N, K), of K channels or locations.
        mask: (N, M, K), non-negative.

    Returns:
        (N, M).
    """
    # The quotient first: it is at most 1, while the gradient of the other order overflows where a mask is all 0.
    shares = safe_divide(mask, mask.sum(dim=2, keepdim=True))
    return torch.einsum("nmk,nk->nm", mask * shares, error)


def dice_overlap(masks: Tensor, form: str = "pairwise") -> Tensor:
    """Dice overlap between the masks of one image, averaged over images; 0 where there is only one mask.

    `pairwise` (MasKD): mean over ordered pairs i != j of 2 <M_i, M_j> / (|M_i|^2 + |M_j|^2), in [0, 1].
    `literal` (ACAM-KD as typeset): sum_{i != j} <M_i, M_j> / sum_i |M_i|^2, in [0, M - 1].

    Args:
        masks: (N, M, K), non-negative, K locations or channels.
        form: `pairwise` or `literal`.
    """
    count = masks.shape[1]
    if count == 1:
        return masks.new_zeros(())
    inner = masks @ masks.transpose(1, 2)  # (N, M, M)
    norms = inner.diagonal(dim1=1, dim2=2)  # (N, M)
    itself = torch.eye(count, dtype=torch.bool, device=masks.device)  # no index: a GPU would wait for its length
    if form == "literal":
        return safe_divide(inner.masked_fill(itself, 0).sum(dim=(1, 2)), norms.sum(dim=1)).mean()
    pair_norms = norms.unsqueeze(2) + norms.unsqueeze(1)  # (N, M, M)
    overlaps = safe_divide(2 * inner, pair_norms).masked_fill(itself, 0)
    return overlaps.sum(dim=(1, 2)).mean() / (count * (count - 1))


def freeze_tokens(module: nn.Module, state: Mapping[str, Tensor] | None) -> None:
    """Load learned tokens into a token module and freeze it.

    Args:
        module: Token module of one level.
        state: Its learned state; None leaves the tokens random, which the log warns of.

    Raises:
        ValueError: The state is of another number of tokens, channels or kind.
    """
    module.requires_grad_(False)
    if state is None:
        log.warning(
            "%s are untrained: no `tokens` were given. Learn them first: acamkd tokens RECIPE", type(module).__name__
        )
        return
    given, needed = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (state, module.state_dict()))
    if given != needed:
        raise ValueError(
            f"the tokens given are {given}, but must be {needed}: learn them for this teacher and layer "
            "(acamkd tokens RECIPE), and give the loss the options that they were learned with"
        )
    module.load_state_dict(state)

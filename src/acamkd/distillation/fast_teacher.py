"""`teacher.precision`: the frozen teacher's forward as inference, as fast as the device allows."""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acamkd.distillation.taps import probe
from acamkd.models.base import Batch, FeatureModel

log = logging.getLogger(__name__)

Precision: TypeAlias = Literal["auto", "32", "bf16", "16"]

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}

ROUNDING = 1e-2
"""A feature map of folded layers may differ by this share of its largest value; otherwise nothing is folded.

Through the hundred layers of an untrained network rounding alone comes to 7e-4."""


class FastTeacher:
    """A frozen teacher's copy, whose feature maps differ by rounding only and come sooner.

    Batch norms are folded into the convolutions before them. On processors, and in half precision, it is channels last.
    In half precision convolutions and linear layers keep their weights in that type; all else follows autocast. The
    teacher itself stays as it is: it is scored, inherited from, and run where gradients pass through it.

    Args:
        teacher: In eval mode.
        layers: What will be tapped, in FeatureTap's grammar.
        precision: Of the forward. `auto`: bfloat16 where the device computes it fast, otherwise 32 bits.
        example: Images that it can be run on.
    """

    def __init__(self, teacher: FeatureModel, layers: Sequence[str], precision: Precision, example: Batch) -> None:
        self.precision = precision
        self.model = copy.deepcopy(teacher)
        self.folded = fold_batch_norms(self.model, example, layers)
        """Names of the batch norms that are folded."""
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            differences = relative_differences(*(probe(model, layers, example) for model in (teacher, self.model)))
        if name := next((each for each, value in differences.items() if not value <= ROUNDING), None):  # or NaN
            log.warning(
                "the teacher's batch norms are not folded: that would change %s by %.2g of its largest value",
                name, differences[name],
            )  # fmt: skip
            self.model, self.folded = copy.deepcopy(teacher), []
        self._dtype: torch.dtype | None = None

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Data type of the forward on a device."""
        return _fast_dtype(device) if self.precision == "auto" else DTYPES[self.precision]

    def on(self, device: torch.device) -> torch.autocast:
        """Context of a forward on a device; the first one settles precision and memory format."""
        if self._dtype is None:
            self._dtype = self.dtype_on(device)
            is_half = self._dtype != torch.float32
            for module in self.model.net.modules() if is_half else ():
                if type(module) in (nn.Conv2d, Conv2dSame, nn.ConvTranspose2d, nn.Linear):
                    module.to(self._dtype)  # autocast would convert the weights in every forward
            if is_last := is_half or device.type == "cpu":  # measured in float32 on processors alone
                self.model.to(memory_format=torch.channels_last)
            log.info(
                "the teacher's forward: %s%s, %d batch norms folded", str(self._dtype).removeprefix("torch."),
                ", channels last" if is_last else "", len(self.folded),
            )  # fmt: skip
        is_half = self._dtype != torch.float32
        return torch.autocast(device.type, self._dtype if is_half else None, enabled=is_half)


def _fast_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 on GPUs that have it and on processors with AMX. Without AMX a processor was 47 times slower with it."""
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if is_fast else torch.float32


def relative_differences(these: Mapping[str, Tensor], those: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of two feature maps over the largest magnitude of the first, by name."""
    return {
        name: float((x.float() - those[name].float()).abs().max() / x.float().abs().max().clamp_min(1e-30))
        for name, x in these.items()
    }


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that read a tensor, by its identity."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count.update({id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)})
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def fold_batch_norms(model: FeatureModel, example: Batch, layers: Sequence[str] = ()) -> list[str]:
    """Fold batch norms in eval mode, learned or frozen, into the convolutions before them, in place.

    A forward shows the pairs: a plain convolution whose outputs nothing but one batch norm reads, which reads nothing
    else. A tap hands a copy on, so that a tapped convolution stays as it is.

    Args:
        model: In eval mode.
        example: Images that it can be run on.
        layers: What must keep its output, in FeatureTap's grammar.

    Returns:
        Names of the batch norms that were folded, in alphabetical order.
    """
    reads = _Reads()
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # by identity; kept, so that no other tensor gets it
    read_by: dict[nn.Module, list[nn.Module | None]] = defaultdict(list)  # by convolution, the norm of each call
    reading: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)  # by norm, what its inputs are from

    def note_output(convolution: nn.Module, _: Any, output: Tensor) -> None:
        outputs[id(output)] = (convolution, output)
        reads.count[id(output)] = 0  # a tensor before it may have had its identity
        read_by[convolution].append(None)

    def note_input(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        convolution, _ = outputs.get(id(inputs[0]), (None, None))
        reading[norm].add(convolution)
        if convolution is not None:
            read_by[convolution][-1] = norm

    with ExitStack() as stack:
        for module in model.net.modules():
            if type(module) in (nn.Conv2d, Conv2dSame) and not module._forward_pre_hooks:
                stack.callback(module.register_forward_hook(note_output).remove)
            elif "running_var" in dict(module.named_buffers(recurse=False)):
                stack.callback(module.register_forward_pre_hook(note_input).remove)
        stack.enter_context(reads)
        probe(model, layers, example)
    elsewhere = {convolution for key, (convolution, _) in outputs.items() if reads.count[key] != 1}
    replacements: dict[nn.Module, nn.Module] = {}
    for convolution, norms in read_by.items():
        norm = norms[0]
        if (
            norm is not None
            and set(norms) == {norm}
            and reading[norm] == {convolution}
            and convolution not in elsewhere
        ):
            rest = _fold(convolution, norm)
            if rest is not None:
                replacements[norm] = rest
    folded = sorted(name for name, module in model.net.named_modules() if module in replacements)
    for parent in list(model.net.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return folded


def _fold(convolution: Any, norm: Any) -> nn.Module | None:
    """Fold a batch norm into a convolution; returns what is left of it, or None where it does more than scale."""
    plain: Any = copy.deepcopy(norm).cpu().double()
    rest: nn.Module = nn.Identity()
    if isinstance(norm, BatchNormAct2d | FrozenBatchNormAct2d):
        rest = nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act)).eval()
        plain.drop, plain.act = nn.Identity(), nn.Identity()
    # All that it does to a channel is read off its values at 0 and 1; the others show whether it does more.
    points = torch.tensor([0.0, 1.0, -1e4, 1e4], dtype=torch.float64)
    values: Tensor = plain(points.view(4, 1, 1, 1).expand(4, convolution.out_channels, 1, 1).contiguous()).flatten(1)
    shift, scale = values[0], values[1] - values[0]
    if not torch.allclose(values, points[:, None] * scale + shift):
        return None
    weight = convolution.weight
    bias = 0.0 if convolution.bias is None else convolution.bias.cpu().double()
    for name, value in (
        ("weight", weight.cpu().double() * scale.view(-1, 1, 1, 1)),
        ("bias", bias * scale + shift),
    ):
        setattr(convolution, name, nn.Parameter(value.to(weight.dtype).to(weight.device), requires_grad=False))
    return rest

"""Weights from a file or from torchvision, matched by name and shape, with a report."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torchvision
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet

from acamkd.errors import AcamkdError, nearest
from acamkd.files import written_whole
from acamkd.models.base import FeatureModel, TaskModel
from acamkd.models.convert import convention_of, to_torchvision
from acamkd.models.weight_files import read_tensors_file

log = logging.getLogger(__name__)

TORCHVISION = re.compile(r"\w+_Weights\.\w+")
"""Names of torchvision's weights, such as RetinaNet_ResNet50_FPN_Weights.COCO_V1."""

WITHOUT_EPSILON = ("RetinaNet_ResNet50_FPN_Weights", "FasterRCNN_ResNet50_FPN_Weights")
"""torchvision's weights whose frozen batch norm was trained without an epsilon."""

EPSILON = 1e-5
"""Epsilon of torch's and torchvision's batch norm."""


@dataclass(frozen=True, repr=False)
class LoadReport:
    """Match between the tensors of a file and of a network; batch norm's step counters are not counted.

    Attributes:
        what: The network or part that was loaded.
        source: The file, or torchvision's name of the weights.
        matched: Tensors that were loaded.
        missing: Tensors of the network that the file lacks.
        unexpected: Tensors of the file that the network lacks.
        deeper: Unexpected tensors that belong to a further block of a part that the network has.
        mismatched: (name, shape in the file, shape in the network).
    """

    what: str
    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    deeper: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def total(self) -> int:
        """Number of tensors of the network."""
        return len(self.matched) + len(self.missing) + len(self.mismatched)

    def __repr__(self) -> str:
        shapes = [f"{name} {theirs} in the file, {ours} in the network" for name, theirs, ours in self.mismatched]
        parts = [f"{self.what} from {self.source}: {len(self.matched)} of {self.total} tensors matched"]
        for word, names in (("missing", self.missing), ("left over", self.unexpected), ("of wrong shape", shapes)):
            if names:
                parts.append(f"{len(names)} {word} ({_first(names)})")
        return "; ".join(parts)


def load_weights(
    module: nn.Module, source: str, *, strict: bool, what: str, convention: str = "torchvision"
) -> LoadReport:
    """Fill a module from a file or from torchvision's weights; a detector also from MMDetection's or detectron2's.

    Args:
        module: Filled in place.
        source: A .safetensors, .pth or .pt file, or a torchvision name such as `ResNet50_Weights.IMAGENET1K_V2`.
            The state dict that fits best is taken out of its containers (`state_dict`, `model`, `ema`, ...) and from
            below its prefixes (`module.`, `net.`).
        strict: Every tensor of the module must be found in its shape; otherwise half of them must.
        what: Name of the module in messages.
        convention: Framework whose detector the module reproduces exactly.

    Raises:
        AcamkdError: The source cannot be read, or does not fit.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors = read_tensors(source, own)
    framework = convention_of(tensors)
    if framework != "torchvision":
        if framework != convention:
            option = f"`options: {{convention: {framework}}}`"
            if isinstance(module, (RetinaNet, FasterRCNN)):
                raise AcamkdError(
                    f"{source} is a detector of {framework}, whose conventions differ: give {what}  {option}"
                )
            as_it_is = ", and reppoints as it is" if framework == "mmdetection" else ""
            raise AcamkdError(
                f"{source} is a detector of {framework}, which {what} does not read: retinanet and faster_rcnn do, "
                f"with {option}{as_it_is}"
            )
        tensors = to_torchvision(tensors, framework)
    state = _adapt_names(tensors, own)
    report = _fill(module, own, state, source, what)
    if strict and len(report.matched) < report.total:
        raise AcamkdError(
            f"{report}\n  every tensor is needed here: check arch, backbone, fpn_channels, options and the classes "
            "(teacher.num_classes, where it was trained on others)"
        )
    if strict and report.deeper:
        log.warning(
            "%s is of a network with further parts (%s), of which %s has none: check its backbone",
            source, _first(report.deeper), what,
        )  # fmt: skip
    if 2 * len(report.matched) < report.total:
        raise AcamkdError(
            f"{source} matched almost nothing of {what}: {len(report.matched)} of {report.total} tensors; "
            f"the file has {_first(state)}, the network {_first(own)}: give weights of this network, or name theirs"
        )
    return report


def _fill(
    module: nn.Module, own: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], source: str, what: str
) -> LoadReport:
    """Load the tensors that fit the module's `own` shapes, and report the rest."""
    mismatched = {
        name: (tuple(tensor.shape), own[name])
        for name, tensor in state.items()
        if name in own and tuple(tensor.shape) != own[name]
    }
    try:
        # Names are not compared directly, since modules may convert older names while they load.
        result = module.load_state_dict({n: t for n, t in state.items() if n not in mismatched}, strict=False)
    except RuntimeError as error:
        raise AcamkdError(f"{source} does not fit {what}: {error}") from error
    missing = [name for name in result.missing_keys if name not in mismatched and not _is_counter(name)]
    unmatched = {*missing, *mismatched}
    return LoadReport(
        what=what,
        source=source,
        matched=tuple(name for name in own if name not in unmatched and not _is_counter(name)),
        missing=tuple(missing),
        unexpected=tuple(name for name in result.unexpected_keys if not _is_counter(name)),
        deeper=tuple(name for name in result.unexpected_keys if is_further_part(module, name)),
        mismatched=tuple((name, *shapes) for name, shapes in mismatched.items()),
    )


def save_weights(net: nn.Module, path: Path) -> None:
    """Write a network's state dict as safetensors, completely or not at all."""
    save_tensors(net.state_dict(), path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any device as safetensors, completely or not at all."""
    # Clones, since safetensors refuses tensors that share memory, and every name must be in the file.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as unfinished:
        unfinished.write_bytes(save(state))  # save_file would make the file unreadable for other users


def inherit(student: TaskModel, teacher: FeatureModel, parts: Sequence[str]) -> None:
    """Start parts of the student's network from the teacher's tensors.

    Args:
        student: Changed in place.
        teacher: Must have modules of the same names and shapes.
        parts: Names of sub-modules of `net`, such as `head` or `backbone.fpn`.

    Raises:
        AcamkdError: A part does not exist in one of the networks, or a tensor has another shape.
    """
    for part in parts:
        ours, theirs = _part("student", student.net, part), _part("teacher", teacher.net, part).state_dict()
        for name, tensor in ours.state_dict().items():
            if _is_counter(name):
                continue
            if name not in theirs:
                raise AcamkdError(f"inherit {part}: the teacher has no tensor {part}.{name}")
            if tensor.shape != theirs[name].shape:
                raise AcamkdError(
                    f"inherit {part}: {part}.{name} is {tuple(tensor.shape)} in the student and "
                    f"{tuple(theirs[name].shape)} in the teacher; only equal shapes can be inherited"
                )
        ours.load_state_dict(theirs, strict=False)


@contextmanager
def hub_errors(what: str, key: str = "backbone_weights", advice: str | None = None) -> Iterator[None]:
    """Turn download errors, which differ by framework, into an AcamkdError with advice on the recipe's `key`."""
    advice = advice or f"give a local file ({key}: FILE), or {key}: null to start without"
    log.info("%s: pretrained weights, which are downloaded unless they are stored here (%s)", what, key)
    try:
        yield
    except AcamkdError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise AcamkdError(
            f"cannot get the pretrained weights of {what} ({type(error).__name__}: {reason}); {advice}"
        ) from error


def _part(who: str, net: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(net.named_modules())
    if name not in modules:
        raise AcamkdError(f"inherit {name}: the {who}'s network has no such part; {nearest(name, modules)}")
    return modules[name]


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def is_further_part(module: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to a numbered module that a network lacks, while it has others."""
    for part in name.split(".")[:-1]:
        children = dict(module.named_children())
        if part not in children:
            return part.isdigit()
        module = children[part]
    return False


def _adapt_names(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Drop a common prefix, and follow timm, whose `features_only` renames `stages.0` to `stages_0`."""
    roots = {name.partition(".")[0] for name in own}
    while (
        all("." in name for name in state)
        and len(first := {name.partition(".")[0] for name in state}) == 1
        and not first & roots
    ):
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    flat = {name.replace(".", "_"): name for name in own}
    return {flat.get(name.replace(".", "_"), name): tensor for name, tensor in state.items()}


def read_tensors(source: str, own: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Read tensors of a file or of torchvision; for the latter, `own` holds the shapes that the network expects."""
    if TORCHVISION.fullmatch(source):
        return _read_torchvision(source, own or {})
    path = Path(source)
    if path.suffix == ".pkl":
        raise AcamkdError(
            f"weights {source}: reading a pickle can run any code. If you trust it, convert it once: torch.save({{n: "
            f"torch.as_tensor(x) for n, x in pickle.load(open(OLD, 'rb'), encoding='latin1')['model'].items()}}, NEW)"
        )
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise AcamkdError(
            f"weights {source}: give a .safetensors, .pth or .pt file, or a torchvision name such as "
            f"RetinaNet_ResNet50_FPN_Weights.COCO_V1"
        )
    if not path.is_file():
        raise AcamkdError(f"weights {source}: there is no such file")
    return read_tensors_file(path, own)


def _read_torchvision(source: str, own: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    try:
        weights = torchvision.models.get_weight(source)
    except (ValueError, KeyError) as error:
        models = torchvision.models
        known = [str(weights) for name in models.list_models() for weights in models.get_model_weights(name)]
        raise AcamkdError(f"torchvision has no weights {source}; {nearest(source, known)}") from error
    with hub_errors(source, "weights"):
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    if source.startswith(WITHOUT_EPSILON):
        state = with_epsilon(state)
    return _drop_unused_classes(state, own, weights.meta.get("categories", ()))


def with_epsilon(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapt weights of batch norm trained with sqrt(variance) to layers with sqrt(variance + EPSILON), in eval mode.

    The tensors change rather than the modules, so that saved weights of the network load like any others.
    """
    scaled = dict(state)
    for name, variance in state.items():
        layer, _, entry = name.rpartition(".")
        if entry == "running_var":
            factor = (1 + EPSILON / variance.double()).sqrt()  # variances of dead filters are tiny in float32
            scaled[f"{layer}.weight"] = (state[f"{layer}.weight"] * factor).to(variance.dtype)
    return scaled


def _drop_unused_classes(
    state: Mapping[str, Tensor], own: Mapping[str, tuple[int, ...]], categories: Sequence[str]
) -> dict[str, Tensor]:
    """Drop the rows of placeholder classes (N/A) that the network does not have.

    torchvision's COCO detectors count 91 classes, of which 10 are called N/A, so that labels equal COCO's category
    ids; data sets number the 80 real ones without gaps.
    """
    if "N/A" not in categories:
        return dict(state)
    kept = [index for index, category in enumerate(categories) if category != "N/A"]
    state = dict(state)
    for name, tensor in state.items():
        layer = name.split(".")[-2] if "." in name else ""
        if layer not in ("cls_logits", "cls_score", "bbox_pred") or name not in own or len(tensor) == own[name][0]:
            continue
        # Rows are (classes, 4 sides) in Faster R-CNN's box_pred and (anchors, classes) everywhere else.
        lead = 1 if layer == "bbox_pred" else len(tensor) // len(categories)
        rows = tensor.reshape(lead, len(categories), -1, *tensor.shape[1:])[:, kept].flatten(0, 2)
        if tuple(rows.shape) == own[name]:
            state[name] = rows
    return state

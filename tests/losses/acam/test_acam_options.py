"""ACAM's options: what is built of them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from acamkd.losses.acam.acam import ACAM
from tiny_maps import joint, maps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["fusion", "channel", "spatial"]),
        ({"align": True}, ["align", "fusion", "channel", "spatial"]),
        ({"masks": "channel"}, ["fusion", "channel"]),
        ({"masks": "spatial"}, ["fusion", "spatial"]),
        ({"mask_source": "teacher", "masks": "spatial"}, ["fusion", "spatial"]),
        ({"mask_source": "random"}, ["fusion", "channel", "spatial"]),
        ({"mask_source": "fixed"}, ["channel", "spatial"]),
        ({"mask_source": "uniform"}, []),
        ({"mask_source": "uniform", "align": True}, ["align"]),
        (ACAM.PRESETS["paper"], ["fusion", "channel", "spatial"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_only_the_parameters_in_use_exist(options: dict[str, Any], expected: list[str]) -> None:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "align": {"align.weight": (8, 8, 1, 1), "align.bias": (8,)},
        "fusion": {
            "fusion.query.weight": (4, 8, 1, 1), "fusion.query.bias": (4,),
            "fusion.key.weight": (4, 8, 1, 1), "fusion.key.bias": (4,),
            "fusion.value.weight": (8, 8, 1, 1), "fusion.value.bias": (8,),
        },
        "channel": {"selection.channel": (6, 1)},
        "spatial": {"selection.spatial": (6, 8)},
    }  # fmt: skip
    wanted = {name: shape for part in expected for name, shape in shapes[part].items()}
    assert {name: tuple(tensor.shape) for name, tensor in joint(8, 8, **options).state_dict().items()} == wanted


def test_unequal_channels_are_aligned() -> None:
    assert tuple(joint(3, 8).state_dict()["align.weight"].shape) == (8, 3, 1, 1)
    assert tuple(joint(3, 1).state_dict()["fusion.query.weight"].shape) == (1, 1, 1, 1)


@pytest.mark.parametrize("source", ["cooperative", "teacher", "fixed", "random", "uniform"])
def test_frozen_masks_leave_only_the_projection_to_learn(source: Any) -> None:
    learned = {
        name for name, parameter in joint(3, 4, mask_source=source).named_parameters() if parameter.requires_grad
    }
    assert {"align.weight", "align.bias"} <= learned
    assert (learned == {"align.weight", "align.bias"}) == (source in ("fixed", "random", "uniform"))


def test_the_paper_preset_is_the_literal_method() -> None:
    assert ACAM.PRESETS["paper"] == {
        "num_masks": 6, "weight": 1.0, "diversity_weight": 1.0, "query": "teacher", "masks": "both",
        "mask_source": "cooperative", "mask_grad": "joint", "imitation": "squared", "diversity": "literal",
        "kv_stride": 1, "normalize": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": "both"}, "query must be one of 'teacher', 'student', not 'both'"),
        ({"mask_source": "none"}, "mask_source must be one of 'cooperative', .* not 'none'"),
        ({"mask_grad": "none"}, "mask_grad must be one of 'look_ahead', 'joint', 'detached', 'task', not 'none'"),
        ({"mask_grad": "task", "mask_source": "uniform"}, "mask_source='uniform' has none"),
        ({"mask_grad": "task", "mask_source": "random"}, "mask_source='random' has none"),
        (
            {"imitation": "cosine"},
            "imitation must be one of 'squared', 'standardized', 'softmax', 'correlation', not 'cosine'",
        ),
        ({"diversity": "dice"}, "diversity must be one of 'pairwise', 'literal', not 'dice'"),
        ({"masks": "position"}, "masks must be one of 'spatial', 'channel', 'both', not 'position'"),
        ({"num_masks": 0}, "num_masks must be at least 1, not 0"),
        ({"kv_stride": 0}, "kv_stride must be a whole number from 1, or 'auto', not 0"),
        ({"kv_stride": "half"}, "kv_stride must be a whole number from 1, or 'auto', not 'half'"),
        (
            {"normalize": True, "mask_source": "uniform"},
            "normalize acts on the fusion, and mask_source='uniform' has none",
        ),
        (
            {"kv_stride": "auto", "mask_source": "fixed"},
            "kv_stride acts on the fusion, and mask_source='fixed' has none",
        ),
        *(
            (
                {"query": "student", "mask_source": source},
                f"query='student' needs masks of both networks, not those of mask_source='{source}'",
            )
            for source in ("teacher", "fixed", "uniform")
        ),
        ({"temperature": 4.0}, "temperature acts on 'softmax' and 'correlation', not on imitation='standardized'"),
        ({"temperature": 4.0, "imitation": "squared"}, "temperature acts on .*, not on imitation='squared'"),
        ({"mask_source": "random", "on_mask_collapse": "stop"}, "on_mask_collapse='stop' needs masks that learn"),
        ({"tokens": {}}, "tokens belong to mask_source='fixed', not to 'cooperative'"),
        (
            {"mask_source": "fixed", "masks": "channel", "tokens": {"channel": torch.zeros(3, 1)}},
            r"the tokens given are \{'channel': \(3, 1\)\}, but must be \{'channel': \(6, 1\)\}",
        ),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACAM(4, 4, **options)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 5, 4, 4), (2, 4, 4, 4), r"the student's feature map is \(2, 5, 4, 4\), but must be \(N, 3, H, W\)"),
        ((2, 3, 4, 4), (2, 3, 4, 4), r"the teacher's feature map is \(2, 3, 4, 4\), but must be \(N, 4, H, W\)"),
        ((2, 3, 4), (2, 4, 4, 4), r"the student's feature map is \(2, 3, 4\)"),
        ((2, 3, 4, 4), (1, 4, 4, 4), "batch sizes differ, student 2, teacher 1"),
    ],
)
def test_maps_that_do_not_fit_are_refused(student: tuple[int, ...], teacher: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint(3, 4)(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("source", ["random", "uniform", "fixed"])
def test_what_trains_the_masks_does_not_matter_where_none_learn(source: Any) -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    found = []
    for how in ("look_ahead", "joint", "detached"):
        torch.manual_seed(0)
        terms = ACAM(3, 4, mask_source=source, mask_grad=how).double()(student, teacher)  # without a task gradient
        found.append((terms, torch.autograd.grad(torch.stack(list(terms.values())).sum(), student)[0]))
    for terms, gradient in found[1:]:
        assert terms == found[0][0]
        assert torch.equal(gradient, found[0][1])

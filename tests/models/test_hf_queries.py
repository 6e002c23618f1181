"""Decoders of transformers' detectors, asked about given boxes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from acamkd.distillation.calls import recorded_calls
from acamkd.losses.ld import edge_positions
from acamkd.models.base import Batch, Call, TaskModel
from tiny_hf import TWO_STAGE, batch_of, detector

pytest.importorskip("transformers")

KINDS = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "rf_detr", "lw_detr", "dab-detr", "deformable_detr")


def call_of(model: TaskModel, batch: Batch) -> tuple[Call, dict[str, Tensor]]:
    assert model.query_decoder is not None
    with recorded_calls(model.net, [model.query_decoder.layer]) as calls:
        outputs = dict(model(batch))
    return calls[model.query_decoder.layer], outputs


@pytest.mark.parametrize("kind", KINDS)
def test_asked_about_its_own_boxes_a_decoder_says_what_it_predicts(kind: str) -> None:
    model = detector(kind, **(TWO_STAGE if kind == "deformable_detr" else {}))
    decoder = model.query_decoder
    assert decoder is not None
    batch = batch_of(model)
    call, outputs = call_of(model.eval(), batch)
    own = decoder.own_boxes(call)
    assert own.shape == (2, 20, 4)
    answers = decoder.answer(call, own)
    torch.testing.assert_close(answers.logits, outputs["logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answers.boxes, outputs["pred_boxes"], atol=1e-4, rtol=1e-4)
    assert decoder.has_corners == (kind in ("d_fine", "deimv2"))
    if decoder.has_corners:  # the mean of the edges' distributions is the box
        assert answers.corners is not None
        assert answers.initial is not None
        assert answers.shifts is not None
        edges = (answers.corners.softmax(-1) * edge_positions(answers.initial, answers.shifts)).sum(-1)
        left, top, right, bottom = edges.unbind(-1)
        boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], -1)
        torch.testing.assert_close(boxes, answers.boxes, atol=1e-5, rtol=1e-4)
    # In training there are denoising queries, groups of queries and dropout; none of them answers.
    net: Any = model.net
    net.model.decoder.train()
    again = decoder.answer(call, own[:, :7])
    assert again.boxes.shape == (2, 7, 4)
    assert net.model.decoder.training
    trained, _ = call_of(model.train(), batch)
    assert decoder.own_boxes(trained).shape == own.shape
    assert decoder.answer(trained, own).logits.shape == answers.logits.shape


@pytest.mark.parametrize(
    ("kind", "options"), [("detr", {}), ("deformable_detr", {}), ("dab-detr", {"num_patterns": 2})]
)
def test_other_detectors_have_no_such_decoder(kind: str, options: dict[str, Any]) -> None:
    assert detector(kind, **options).query_decoder is None

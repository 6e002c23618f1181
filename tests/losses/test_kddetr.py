from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from acamkd.losses import KDDETR, LD, DistillationContext
from acamkd.losses.ld import edge_positions, onto_bins, to_shifts
from acamkd.losses.queries import SIDES
from acamkd.models.base import Answers, Batch, Call, Outputs, Prediction, QueryDecoder, TaskModel
from acamkd.models.segmentation import Segmenter


def answers(seed: int, *, queries: int = 3, classes: int = 2, bins: int = 5) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, queries, classes, generator=generator, dtype=torch.float64)
    boxes, initial = (0.1 + 0.4 * torch.rand(2, queries, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    corners = torch.randn(2, queries, 4, bins, generator=generator, dtype=torch.float64)
    return Answers(logits, boxes, corners, initial, torch.linspace(-0.5, 0.5, bins, dtype=torch.float64))


SHARE = torch.tensor([[0.1, 0.2, 0.1], [0.3, 0.1, 0.2]], dtype=torch.float64)


def giou(one: list[float], other: list[float]) -> float:
    (a, b, c, d), (e, f, g, h) = ([x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in (one, other))
    overlap = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = (c - a) * (d - b) + (g - e) * (h - f) - overlap
    hull = (max(c, g) - min(a, e)) * (max(d, h) - min(b, f))
    return overlap / union - (hull - union) / hull


def test_classes_and_boxes_query_by_query() -> None:
    student, teacher = answers(0), answers(1)
    classification = boxes = 0.0
    for n in range(2):
        for q in range(3):
            for c in range(2):
                s, t = (1 / (1 + math.exp(-x.logits[n, q, c].item())) for x in (student, teacher))
                divergence = t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))
                classification += SHARE[n, q].item() * divergence
            s_box, t_box = student.boxes[n, q].tolist(), teacher.boxes[n, q].tolist()
            l1 = sum(abs(a - b) for a, b in zip(s_box, t_box, strict=True))
            boxes += SHARE[n, q].item() * (5 * l1 + 2 * (1 - giou(s_box, t_box)))
    found = KDDETR(weight=2, classification_weight=3, box_weight=0.5).compare(student, teacher, SHARE)
    assert found["classification"].item() == pytest.approx(6 * classification)
    assert found["boxes"].item() == pytest.approx(boxes, rel=1e-5)
    same = KDDETR().compare(teacher, teacher, SHARE)
    assert {name: term.item() for name, term in same.items()} == pytest.approx(
        {"classification": 0, "boxes": 0}, abs=1e-5
    )


def test_edges_bin_by_bin() -> None:
    student, teacher, tau = answers(0), answers(1), 2.0
    bins = student.shifts
    assert bins is not None
    assert student.corners is not None
    assert student.initial is not None
    assert teacher.corners is not None
    assert teacher.initial is not None
    total = 0.0
    for n in range(2):
        for q in range(3):
            for edge in range(4):
                axis, sign = edge % 2, -1 if edge < 2 else 1
                (t_center, t_side), (s_center, s_side) = (
                    (x[n, q, axis].item(), x[n, q, 2 + axis].item()) for x in (teacher.initial, student.initial)
                )
                moved = [0.0] * len(bins)
                p = (teacher.corners[n, q, edge] / tau).softmax(0).tolist()
                for shift, mass in zip(bins.tolist(), p, strict=True):
                    position = t_center + sign * (0.5 + shift) * t_side
                    own = min(max((sign * (position - s_center) / s_side - 0.5 - bins[0].item()) / 0.25, 0), 4)
                    below = min(int(own), 3)
                    moved[below] += mass * (below + 1 - own)
                    moved[below + 1] += mass * (own - below)
                log_s = (student.corners[n, q, edge] / tau).log_softmax(0).tolist()
                divergence = sum(m * (math.log(m) - s) for m, s in zip(moved, log_s, strict=True) if m > 0)
                total += SHARE[n, q].item() * divergence / 4
    found = LD(weight=0.5, temperature=tau).compare(student, teacher, SHARE)
    assert found["edge"].item() == pytest.approx(0.5 * tau**2 * total)
    assert LD().compare(teacher, teacher, SHARE)["edge"].item() == pytest.approx(0, abs=1e-9)


def test_bins_keep_sum_and_mean() -> None:
    bins = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    values = torch.tensor([-1.9, -0.1, 0.0, 1.0, 1.7])
    p = torch.tensor([0.1, 0.2, 0.3, 0.3, 0.1])
    moved = onto_bins(p, values, bins)
    assert moved.sum().item() == pytest.approx(1)
    assert (moved * bins).sum().item() == pytest.approx((p * values).sum().item())
    torch.testing.assert_close(onto_bins(p, bins, bins), p)
    assert onto_bins(torch.ones(1), torch.tensor([9.0]), bins).tolist() == [0, 0, 0, 0, 1]
    initial = torch.tensor([[[0.5, 0.4, 0.2, 0.3]]])
    positions = edge_positions(initial, bins)
    assert positions[0, 0, :, 2].tolist() == pytest.approx([0.4, 0.25, 0.6, 0.55])
    torch.testing.assert_close(to_shifts(positions, initial), bins.expand(1, 1, 4, 5))


@dataclass
class Asked(QueryDecoder):
    """Answers with the boxes that it is asked about, in units of its own."""

    unit: float
    layer: str = "decoder"
    seen: list[Tensor] = field(default_factory=list)

    def units(self, batch: Batch) -> Tensor:
        return torch.full((len(batch.sizes), 4), self.unit)

    def own_boxes(self, call: Call) -> Tensor:
        return torch.full((2, 3, 4), 0.25)

    def answer(self, call: Call, boxes: Tensor) -> Answers:
        self.seen.append(boxes)
        return Answers(call.kwargs["logits"] * boxes[..., :1], boxes)


class Detector(TaskModel):
    """A network of which nothing is run."""

    task = "detection"

    def __init__(self, unit: float) -> None:
        super().__init__(torch.nn.Conv2d(3, 2, 1), 2, (0.5,) * 3, (0.2,) * 3)
        self.asked = Asked(unit)

    @property
    def query_decoder(self) -> QueryDecoder:
        return self.asked

    def prepare(self, images: object, targets: object = None) -> Batch:
        raise NotImplementedError

    def forward(self, batch: Batch) -> Outputs:
        raise NotImplementedError

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def decode(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        raise NotImplementedError


def asked(loss: KDDETR, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    student, teacher = Detector(100), Detector(200)
    calls = [{"decoder": Call((), {"logits": torch.tensor([logit, -logit])})} for logit in (3.0, 2.0)]
    context = DistillationContext(student_calls=calls[0], teacher_calls=calls[1])
    return loss(student, teacher, {}, {}, batch, context), student.asked.seen, teacher.asked.seen


def test_every_set_asks_both_about_the_same_boxes() -> None:
    boxes = torch.tensor([[20.0, 40.0, 60.0, 100.0], [0.0, 0.0, 10.0, 10.0]])
    targets = [{"boxes": each, "labels": torch.ones(len(each), dtype=torch.int64)} for each in (boxes, boxes[:1])]
    batch = Batch(torch.zeros(2, 3, 100, 100), [(100, 100)] * 2, [(100, 100)] * 2, targets)
    terms, of_student, of_teacher = asked(KDDETR(queries=("specific", "general", "targets"), count=40), batch)
    specific, general, objects = of_teacher
    for boxes_s, boxes_t in zip(of_student, of_teacher, strict=True):
        torch.testing.assert_close(boxes_s * 100, boxes_t * 200)
    assert (specific == 0.25).all()
    assert general.shape == (2, 40, 4)
    assert SIDES[0] <= general[..., 2:].min() < 0.1 < 0.4 < general[..., 2:].max() <= SIDES[1]
    assert objects.shape == (2, 2, 4)
    torch.testing.assert_close(objects[0], torch.tensor([[0.2, 0.35, 0.2, 0.3], [0.025, 0.025, 0.05, 0.05]]))
    torch.testing.assert_close(objects[1, 0], objects[0, 0])
    assert terms["classification"] > 0
    assert terms["boxes"].item() == pytest.approx(0, abs=1e-5)  # in the teacher's units they are equal
    parts = [asked(KDDETR(queries=("specific",)), batch)[0], asked(KDDETR(queries=("specific", "specific")), batch)[0]]
    assert parts[1]["classification"].item() == pytest.approx(2 * parts[0]["classification"].item())


def test_images_without_objects_and_without_targets() -> None:
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    batch = Batch(torch.zeros(1, 3, 100, 100), [(100, 100)], [(100, 100)], empty)
    terms, seen, _ = asked(KDDETR(queries=("targets",)), batch)
    assert {name: term.item() for name, term in terms.items()} == {"classification": 0, "boxes": 0}
    assert not seen
    with pytest.raises(ValueError, match="KDDETR needs boxes for queries that start from the objects"):
        asked(KDDETR(queries=("targets",)), Batch(batch.pixels, batch.sizes, batch.original_sizes))
    assert KDDETR(queries=("targets",)).needs_targets
    assert not KDDETR().needs_targets


def test_what_cannot_be_asked_is_refused() -> None:
    segmenter = Segmenter(torch.nn.Conv2d(3, 2, 1), 2)
    with pytest.raises(ValueError, match=r"KDDETR needs detectors .* on both sides, and the teacher is Conv2d"):
        KDDETR().layers(Detector(1), segmenter)
    with pytest.raises(ValueError, match=r"LD needs distributions of edges, of D-FINE or DEIMv2, .* not Conv2d and"):
        LD().layers(Detector(1), Detector(1))
    for wrong in ({"queries": ()}, {"queries": ("own",)}, {"count": 0}):
        with pytest.raises(ValueError, match="queries must be some of specific, general, targets, and count 1 or more"):
            KDDETR(**wrong)

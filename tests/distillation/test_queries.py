"""Query detectors of two families in a Distiller."""

from __future__ import annotations

import pytest
import torch

from acamkd import config
from acamkd.distillation.build import build_distiller
from acamkd.engine.mask_history import compared_pairs
from acamkd.errors import AcamkdError
from tiny_hf import TWO_STAGE, batch_of, detector

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("of_student", "of_teacher"), [("deimv2", "d_fine"), ("rf_detr", "rt_detr"), ("dab-detr", "deformable_detr")]
)
def test_a_step_reaches_everything_below_the_decoder(of_student: str, of_teacher: str) -> None:
    entries = [config.Loss(name="kddetr", queries=["specific", "general", "targets"], count=5)]
    if of_student == "deimv2":
        entries.append(config.Loss(name="ld"))
        entries.append(config.Loss(name="pkd", pairs=("model.encoder.pan_blocks.1",)))
    student = detector(of_student, 1)
    teacher = detector(of_teacher, **(TWO_STAGE if of_teacher == "deformable_detr" else {}))
    distiller = build_distiller(student, teacher, entries).train()
    terms = distiller(batch_of(student))
    distilled = {name: term for name, term in terms.items() if name.startswith("head/")}
    assert len(distilled) == (3 if of_student == "deimv2" else 2)
    assert all(term.isfinite() and term > 0 for term in distilled.values())
    torch.stack(list(distilled.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in student.backbone.parameters() if p.requires_grad and p.ndim == 4)
    assert all(p.grad is None for p in teacher.parameters())
    compared = {name for name, _, _ in compared_pairs(distiller)}
    assert compared == ({"model.encoder.pan_blocks.1"} if of_student == "deimv2" else set())  # queries have no maps
    unlabeled = build_distiller(student, teacher, [config.Loss(name="kddetr")]).train()
    unlabeled.check_unlabeled()
    found = unlabeled(batch_of(student, labeled=False), labeled=False)
    assert set(found) == {"head/kddetr/classification", "head/kddetr/boxes"}


def test_detectors_without_such_queries_are_refused() -> None:
    with pytest.raises(
        AcamkdError, match=r"losses.0 \(kddetr\): KDDETR needs detectors .* and the teacher is DetrFor.* vectors"
    ):
        build_distiller(detector("rt_detr"), detector("detr"), [config.Loss(name="kddetr")])
    with pytest.raises(AcamkdError, match=r"losses.0 \(ld\): LD needs distributions of edges, .* not RTDetrForObject"):
        build_distiller(detector("rt_detr"), detector("d_fine"), [config.Loss(name="ld")])


def test_what_asks_the_decoders_does_without_precision_and_compilation(caplog: pytest.LogCaptureFixture) -> None:
    entries = [config.Loss(name="kddetr")]
    build_distiller(detector("rt_detr"), detector("rt_detr"), entries, "bf16").compile_parts()
    assert [text for text in caplog.messages if "needs arguments" in text] == [
        "head/kddetr needs arguments of the teacher's modules, so that teacher.precision is not used",
        "train.compile: nothing is compiled, since head/kddetr needs arguments of the networks' modules",
    ]

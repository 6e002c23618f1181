"""The four distances by hand, and against the losses that they come from."""

from __future__ import annotations

import pytest
import torch

from acamkd.losses import CWD, DIST, PKD
from acamkd.losses.acam.distances import distillation_distances
from acamkd.losses.acam.masks import Masks
from acamkd.losses.functional import standardize
from tiny_maps import maps


@pytest.mark.parametrize("form", ["squared", "standardized", "softmax", "correlation"])
def test_distances_of_a_channel_and_of_a_location(form: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    student_given, teacher_given = student, teacher
    errors = distillation_distances(student, teacher, Masks._fields, form, temperature=2.0)
    over_channels, over_locations = errors["channel"], errors["spatial"]
    assert over_channels.shape == (2, 3)
    assert over_locations.shape == (2, 20)
    if form == "softmax":
        rows = [x[1, 2].flatten() / 2 for x in (student, teacher)]  # one channel of one image
        columns = [x[1, :, 3, 4] / 2 for x in (student, teacher)]  # its last location
        for (s, t), value in ((rows, over_channels[1, 2]), (columns, over_locations[1, 19])):
            expected = 4 * sum(t.softmax(0) * (t.softmax(0) / s.softmax(0)).log())
            torch.testing.assert_close(value, expected)
    elif form == "correlation":
        probabilities = [(x / 2).softmax(dim=1)[1] for x in (student, teacher)]  # of one image
        for place, value in (((2,), over_channels[1, 2]), ((slice(None), 3, 4), over_locations[1, 19])):
            similar = torch.corrcoef(torch.stack([p[place].flatten() for p in probabilities]))[0, 1]
            torch.testing.assert_close(value, 4 * (1 - similar), rtol=1e-5, atol=0)
    else:
        if form == "standardized":
            student, teacher = (
                (x - x.mean((0, 2, 3), True)) / x.std((0, 2, 3), keepdim=True) for x in (student, teacher)
            )
        squared = (student - teacher).square()
        torch.testing.assert_close(over_channels, squared.mean(dim=(2, 3)), rtol=1e-4, atol=0)
        torch.testing.assert_close(over_locations, squared.mean(dim=1).flatten(1), rtol=1e-4, atol=0)
    for kind in Masks._fields:
        (alone,) = distillation_distances(student_given, teacher_given, (kind,), form, temperature=2.0).items()
        assert alone[0] == kind
        torch.testing.assert_close(alone[1], errors[kind])
    for error in distillation_distances(teacher, teacher, Masks._fields, form).values():
        assert error.abs().max() < (1e-5 if form == "correlation" else 1e-12)  # whose denominator has 1e-8 more


def test_distances_are_those_of_the_losses_they_come_from() -> None:
    student, teacher = maps(1, 4, 4, 5, 3)

    def mean(form: str, kind: str) -> torch.Tensor:
        return distillation_distances(student, teacher, (kind,), form, temperature=2.0)[kind].mean()

    for kind in ("channel", "spatial"):
        cwd = CWD(4, 4, weight=1.0, temperature=2.0, normalization=kind)(student, teacher)
        torch.testing.assert_close(mean("softmax", kind), cwd[kind])
        pkd = PKD(4, 4, weight=2.0)(student, teacher)["correlation"]
        torch.testing.assert_close(mean("standardized", kind), pkd)
    dist = DIST(4, 4, temperature=2.0)(student, teacher)  # of one image, whose pixels are all of the batch's
    torch.testing.assert_close(mean("correlation", "spatial"), dist["inter"])
    torch.testing.assert_close(mean("correlation", "channel"), dist["intra"])


def test_the_gradient_of_standardized_distances_is_that_of_the_formula() -> None:
    """One channel is constant in the student, another in the teacher."""
    student, teacher = maps(2, 3, 3, 4, 5)
    with torch.no_grad():
        student[:, 1], teacher[:, 2] = 0.3, -2.0
    ours = distillation_distances(student, teacher, Masks._fields, "standardized")
    squared = (standardize(student) - standardize(teacher)).square()
    expected = {"channel": squared.mean(dim=(2, 3)), "spatial": squared.mean(dim=1).flatten(1)}
    directions = {kind: torch.randn_like(error) for kind, error in expected.items()}
    for kinds in (["channel"], ["spatial"], ["channel", "spatial"]):
        totals = [torch.stack([(x[kind] * directions[kind]).sum() for kind in kinds]).sum() for x in (ours, expected)]
        found = [torch.autograd.grad(total, student, retain_graph=True)[0] for total in totals]
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
        assert not found[0][:, 1].any()

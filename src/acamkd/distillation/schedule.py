"""Factor of a loss by step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class WeightSchedule:
    """Factor of a loss by step: a linear ramp from 0 to 1 over the first epochs, and 0 from some epoch on.

    Attributes:
        ramp_epochs: Of the ramp.
        stop_epoch: From where on the loss is left out.
        steps_per_epoch: Of one process; a trainer sets it, who alone knows how many processes share the images.
    """

    ramp_epochs: float = 0
    stop_epoch: float | None = None
    steps_per_epoch: int = 1

    def __call__(self, step: int) -> float:
        """The factor at one step."""
        if self.stop_epoch is not None and step >= round(self.stop_epoch * self.steps_per_epoch):
            return 0.0
        ramp = round(self.ramp_epochs * self.steps_per_epoch)
        return min(1.0, (step + 1) / ramp) if ramp else 1.0

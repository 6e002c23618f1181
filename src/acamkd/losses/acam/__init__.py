"""ACAM-KD: the paper in `reference`, the loss in `acam`."""

from acamkd.losses.acam.acam import ACAM

__all__ = ["ACAM"]

"""Distillation losses: one paper, one file. Usable alone in anybody's training loop."""

from acamkd.losses.acam.acam import ACAM
from acamkd.losses.acam.masks import Masks
from acamkd.losses.at import AT
from acamkd.losses.base import DistillationContext, FeatureLoss, HeadLoss
from acamkd.losses.cankd import CanKD
from acamkd.losses.crosskd import CrossKD
from acamkd.losses.cwd import CWD
from acamkd.losses.dist import DIST
from acamkd.losses.fgd import FGD
from acamkd.losses.fitnet import FitNet
from acamkd.losses.freekd import FreeKD
from acamkd.losses.maskd import MasKD
from acamkd.losses.mgd import MGD
from acamkd.losses.pkd import PKD

__all__ = [
    "ACAM",
    "AT",
    "CWD",
    "DIST",
    "FGD",
    "MGD",
    "PKD",
    "CanKD",
    "CrossKD",
    "DistillationContext",
    "FeatureLoss",
    "FitNet",
    "FreeKD",
    "HeadLoss",
    "MasKD",
    "Masks",
]

"""Distillation losses: one paper, one file. Usable alone in anybody's training loop.

This is the table of the built-in methods: a recipe finds `CWD` as `cwd`.
"""

from acamkd.losses.acam.acam import ACAM as ACAM
from acamkd.losses.at import AT as AT
from acamkd.losses.base import DistillationContext as DistillationContext
from acamkd.losses.base import FeatureLoss as FeatureLoss
from acamkd.losses.base import HeadLoss as HeadLoss
from acamkd.losses.cankd import CanKD as CanKD
from acamkd.losses.cosine import Cosine as Cosine
from acamkd.losses.crosskd import CrossKD as CrossKD
from acamkd.losses.cwd import CWD as CWD
from acamkd.losses.dist import DIST as DIST
from acamkd.losses.fgd import FGD as FGD
from acamkd.losses.fitnet import FitNet as FitNet
from acamkd.losses.freekd import FreeKD as FreeKD
from acamkd.losses.kddetr import KDDETR as KDDETR
from acamkd.losses.ld import LD as LD
from acamkd.losses.maskd import MasKD as MasKD
from acamkd.losses.mgd import MGD as MGD
from acamkd.losses.pkd import PKD as PKD

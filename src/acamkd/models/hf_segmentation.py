"""Segmenters of transformers: logits per pixel, or a class and a mask per query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.models.base import VOID, Batch, Outputs, Prediction, Target
from acamkd.models.hf_base import HFModel
from acamkd.models.segmentation import best_classes, fit_mask


class HFSegmenter(HFModel):
    """A semantic segmenter of transformers; its loss is its own, auxiliary heads included."""

    task = "segmentation"

    def with_targets(self, batch: Batch, targets: Sequence[Target]) -> Batch:
        """Fit the masks to the images; VOID in the padding."""
        masks = [fit_mask(t["mask"], size, batch.input_size) for t, size in zip(targets, batch.sizes, strict=True)]
        return Batch(batch.pixels, batch.sizes, batch.original_sizes, [{"mask": mask} for mask in masks])

    def forward(self, batch: Batch) -> Outputs:
        """Give `out`, the logits (N, K, H, W) at the input's size, and, where there are targets, `loss`."""
        mask = self._mask(batch)
        outputs = self.net(**self.inputs(batch), labels=mask)
        out = F.interpolate(outputs.logits.float(), size=batch.input_size, mode="bilinear", align_corners=False)
        if mask is None:
            return {"out": out}
        # Their mean over no pixel at all would not be a number.
        return {"out": out, "loss": outputs.loss.float() if bool((mask != VOID).any()) else 0 * out.sum()}

    def _mask(self, batch: Batch) -> Tensor | None:
        """Targets (N, H, W); none where they have classes that the network does not know."""
        if batch.targets is None:
            return None
        mask = torch.stack([target["mask"] for target in batch.targets])
        return None if bool(((mask >= self.num_classes) & (mask != VOID)).any()) else mask

    @property
    def unknown_class(self) -> str:
        """Names the label that is too large."""
        return f"a mask has a class above {self.num_classes - 1}, the last that the network knows"

    def decode(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        """Best class of every pixel; logits are brought to the image's size first."""
        return best_classes(self.scores(outputs, batch), batch)

    def exported(self, batch: Batch) -> Mapping[str, Tensor]:
        """Scores of the classes at every pixel, under the name that segmenters' files give them."""
        return {"logits": self.scores(self(batch), batch)}

    def scores(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Scores of the classes at every pixel of the input, (N, K, H, W)."""
        scores: Tensor = outputs["out"]
        return scores


class HFQuerySegmenter(HFSegmenter):
    """A network that gives a class and a mask per query (Mask2Former, EoMT), used for semantic masks.

    A pixel's score for a class is the sum over the queries of p(class) p(pixel in mask). In training each class that
    an image has is one mask.
    """

    def forward(self, batch: Batch) -> Outputs:
        """Give `classes` (N, Q, K + 1), `masks` (N, Q, h, w), both logits, and, where there are targets, `loss`."""
        mask = self._mask(batch)
        labels: dict[str, list[Tensor]] = {}
        if mask is not None:
            present = [each[each != VOID].unique() for each in mask]
            labels["class_labels"] = present
            labels["mask_labels"] = [
                (each == found[:, None, None]).float() for each, found in zip(mask, present, strict=True)
            ]
        outputs = self.net(**self.inputs(batch), **labels)
        found = {"classes": outputs.class_queries_logits.float(), "masks": outputs.masks_queries_logits.float()}
        return found if mask is None else {**found, "loss": outputs.loss.float().sum()}

    def scores(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Scores of the classes at every pixel of the input, (N, K, H, W)."""
        masks = F.interpolate(outputs["masks"], size=batch.input_size, mode="bilinear", align_corners=False)
        return torch.einsum("nqk,nqhw->nkhw", outputs["classes"].softmax(-1)[..., :-1], masks.sigmoid())

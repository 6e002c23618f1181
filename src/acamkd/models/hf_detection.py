"""Detectors of transformers: a box and a class per query."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

from acamkd.errors import AcamkdError
from acamkd.models.base import Batch, Outputs, Prediction, QueryDecoder, Target
from acamkd.models.detection import single_objects
from acamkd.models.hf_base import HFModel
from acamkd.models.hf_queries import DECODERS


class HFDetector(HFModel):
    """A detector of transformers; its loss and detections are those of its own `loss` and of its image processor.

    The loss is made in `forward`, where denoising needs the targets. Crowd boxes stay in the targets but do not train.
    Every query gives a detection: there is neither a threshold nor non-maximum suppression.
    """

    task = "detection"

    @property
    def query_decoder(self) -> QueryDecoder | None:
        """The decoder, where queries start from boxes; DETR's and Conditional DETR's are learned vectors."""
        decoder = DECODERS[self.kind.decoder] if self.kind.decoder else None
        return decoder(self.net, self.units) if decoder is not None and decoder.fits(self.net.config) else None

    def with_targets(self, batch: Batch, targets: Sequence[Target]) -> Batch:
        """Scale the boxes with the images."""
        moved = []
        for target, (h, w), (height, width) in zip(targets, batch.sizes, batch.original_sizes, strict=True):
            boxes = target["boxes"]
            moved.append({**target, "boxes": boxes * boxes.new_tensor([w / width, h / height] * 2)})
        return Batch(batch.pixels, batch.sizes, batch.original_sizes, moved)

    def forward(self, batch: Batch) -> Outputs:
        """Give `logits` (N, Q, K), `pred_boxes` (N, Q, 4) and, where there are targets, `loss`."""
        labels = self._labels(batch)
        try:
            outputs = self.net(**self.inputs(batch), labels=labels)
        except ValueError as error:  # of the matching, which checks its boxes and its costs
            if not re.search("corner|invalid numeric", str(error)):
                raise
            raise AcamkdError(
                f"the boxes of {type(self.net).__name__} are no longer finite: lower the learning rate, or clip the "
                "gradient (train.clip)"
            ) from error
        found = {"logits": outputs.logits.float(), "pred_boxes": outputs.pred_boxes.float()}
        return found if labels is None else {**found, "loss": outputs.loss.float()}

    def _labels(self, batch: Batch) -> list[dict[str, Tensor]] | None:
        """Targets as transformers takes them: labels from 0, boxes as fractions, center and size."""
        if batch.targets is None:
            return None
        labels = []
        for target, unit in zip(single_objects(batch), self.units(batch), strict=True):
            if bool((target["labels"] > self.num_classes).any()):
                return None  # a teacher of other classes, whose loss nobody asks for
            boxes = box_convert(target["boxes"].float(), "xyxy", "cxcywh") / unit
            # The losses make corners of them again: where those coincide, a loss would not be a number.
            corners = box_convert(boxes, "cxcywh", "xyxy")
            solid = (corners[:, 2:] > corners[:, :2]).all(dim=1)
            labels.append({"class_labels": target["labels"][solid] - 1, "boxes": boxes[solid]})
        return labels

    def units(self, batch: Batch) -> Tensor:
        """What boxes are fractions of, (N, 4) pixels of the input: the image where the network sees its end."""
        sizes = batch.sizes if self.kind.is_masked else [batch.input_size] * len(batch.sizes)
        return batch.pixels.new_tensor([[w, h, w, h] for h, w in sizes])

    @property
    def unknown_class(self) -> str:
        """Names the label that is too large."""
        return f"a target has a label above {self.num_classes}, the network's number of classes"

    def decode(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        """Every query's box, best first; without a class for nothing, a query may stand for several classes."""
        scores, labels, corners = self._best(outputs)
        predictions = []
        per_image = (corners, scores, labels, self.units(batch), batch.sizes, batch.original_sizes)
        for boxes, score, label, unit, size, original in zip(*per_image, strict=True):
            scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2, device=boxes.device)
            predictions.append({"boxes": boxes * unit * scale, "scores": score, "labels": label})
        return predictions

    def exported(self, batch: Batch) -> Mapping[str, Tensor]:
        """Every query's box in pixels of the input, best first."""
        scores, labels, corners = self._best(self(batch))
        return {"boxes": corners * self.units(batch)[0], "scores": scores, "labels": labels}

    def _best(self, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (N, Q), best first, labels (N, Q), and boxes (N, Q, 4), x1 y1 x2 y2 as fractions."""
        logits = outputs["logits"]
        queries, classes = logits.shape[1], logits.shape[2]
        if self.kind.has_none_class:
            best, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, picked = best.topk(queries)
            labels = labels.gather(1, picked)
        else:
            scores, flat = logits.sigmoid().flatten(1).topk(queries)
            picked, labels = flat // classes, flat % classes
        boxes = outputs["pred_boxes"].gather(1, picked[..., None].expand(-1, -1, 4))
        return scores, labels + 1, box_convert(boxes, "cxcywh", "xyxy")

"""Detectors of transformers: a box and a class per query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

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
    def max_detections(self) -> int:
        """The number of queries."""
        settings = self.net.config.to_dict()
        if settings.get("two_stage") and "two_stage_num_proposals" in settings:
            return int(settings["two_stage_num_proposals"])
        return int(settings[("num_queries" if "num_queries" in settings else "num_detection_tokens")])

    @property
    def query_decoder(self) -> QueryDecoder | None:
        """RT-DETR's, D-FINE's, DEIMv2's, RF-DETR's and LW-DETR's."""
        return DECODERS[self.kind.decoder](self.net, self.units) if self.kind.decoder else None

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
        outputs = self.net(**self.inputs(batch), labels=labels)
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
            labels.append({"class_labels": target["labels"] - 1, "boxes": boxes})
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
        logits = outputs["logits"]
        queries, classes = logits.shape[1], logits.shape[2]
        if self.kind.has_none_class:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, picked = scores.sort(dim=1, descending=True, stable=True)
            labels = labels.gather(1, picked)
        else:
            scores, flat = logits.sigmoid().flatten(1).topk(queries)
            picked, labels = flat // classes, flat % classes
        predictions = []
        per_image = (outputs["pred_boxes"], picked, scores, labels, self.units(batch), batch.sizes)
        for boxes, indices, score, label, unit, size, original in zip(*per_image, batch.original_sizes, strict=True):
            scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2, device=boxes.device)
            corners = box_convert(boxes[indices], "cxcywh", "xyxy") * unit * scale
            predictions.append({"boxes": corners, "scores": score, "labels": label + 1})
        return predictions

"""Decoders of transformers' detectors, asked about boxes of one's own choice."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from acamkd.models.base import Answers, Batch, Call, QueryDecoder, keeping_modes
from acamkd.models.hf_kinds import Decoder

CONTENT, BOXES = "inputs_embeds", "reference_points"
"""Arguments of most decoders."""


class HFQueryDecoder(QueryDecoder):
    """A decoder with the arguments CONTENT, (N, Q, C), and BOXES.

    Args:
        net: The detector.
        units: Its `units`.
    """

    layer = "model.decoder"

    FIXED: ClassVar[Mapping[str, Any]] = {}
    """Arguments that a second run has in the place of the first one's."""

    @staticmethod
    def fits(settings: Any) -> bool:
        """Whether the queries start from boxes in a network of this configuration."""
        return True

    def __init__(self, net: Any, units: Callable[[Batch], Tensor]) -> None:
        self.net = net
        self._units = units

    def units(self, batch: Batch) -> Tensor:
        """The padded input, or the image where the network sees its end."""
        return self._units(batch)

    def answer(self, call: Call, boxes: Tensor) -> Answers:
        """Run the decoder on queries that start from given boxes."""
        boxes = boxes.detach()
        decoder = self.net.get_submodule(self.layer)
        given = {**call.kwargs, **self.FIXED, **self._queries(call, boxes)}
        with keeping_modes(decoder):  # neither dropout nor groups of queries
            return self._answers(decoder.eval()(*call.args, **given), boxes)

    def _queries(self, call: Call, boxes: Tensor) -> dict[str, Tensor]:
        """Arguments that start from some boxes; the contents are those of the own queries nearest to them (L1)."""
        nearest = torch.cdist(boxes, self.own_boxes(call).to(boxes), p=1).argmin(dim=2)
        content = self._own(call.kwargs[CONTENT])
        content = content.gather(1, nearest[..., None].expand(-1, -1, content.shape[-1]))
        return {CONTENT: content, BOXES: self._start(boxes).to(call.kwargs[BOXES].dtype)}

    def _own(self, queries: Tensor) -> Tensor:
        """What a prediction would use of an argument, (N, Q, ...): no denoising queries, and one group."""
        return queries

    def _start(self, boxes: Tensor) -> Tensor:
        """The argument BOXES for some boxes."""
        return boxes

    @abstractmethod
    def _answers(self, output: Any, boxes: Tensor) -> Answers:
        """What the heads say of the decoder's output."""


class HybridDecoder(HFQueryDecoder):
    """RT-DETR's, RT-DETRv2's, D-FINE's and DEIMv2's: the heads are in the decoder."""

    FIXED: ClassVar[Mapping[str, Any]] = {"encoder_attention_mask": None}  # which hid the denoising queries

    @property
    def has_corners(self) -> bool:
        """Whether it is D-FINE's or DEIMv2's."""
        return "max_num_bins" in self.net.config.to_dict()

    def own_boxes(self, call: Call) -> Tensor:
        """The chosen proposals of the encoder; they are given before their sigmoid."""
        return self._own(call.kwargs[BOXES]).detach().float().sigmoid()

    def _own(self, queries: Tensor) -> Tensor:
        return queries[:, -self.net.config.num_queries :]  # behind the denoising queries

    def _start(self, boxes: Tensor) -> Tensor:
        return boxes.logit(eps=1e-5)

    def _answers(self, output: Any, boxes: Tensor) -> Answers:
        answers = Answers(
            output.intermediate_logits[:, -1].float(), output.intermediate_reference_points[:, -1].float()
        )
        if not self.has_corners:
            return answers
        corners = output.intermediate_predicted_corners[:, -1].float()
        return answers._replace(
            corners=corners.unflatten(-1, (4, -1)),
            initial=output.initial_reference_points[:, -1].float(),
            shifts=edge_shifts(self.net.model.decoder),
        )


def edge_shifts(decoder: Any) -> Tensor:
    """How far each bin of D-FINE moves an edge outward, in sides of the initial box, (B,) from inward to outward.

    For n + 1 bins, a = up reg_scale and s = (a + 1)^(2 / (n - 2)), the shifts in units of 1 / reg_scale are 0,
    +-(s^i - 1) for i = 1 ... n / 2 - 1, and +-2 a (Peng et al., D-FINE, ICLR 2025, https://arxiv.org/abs/2410.13842).
    """
    bins: int = decoder.max_num_bins
    scale: Tensor = decoder.reg_scale.detach().float().abs()
    limit: Tensor = decoder.up.detach().float().abs() * scale
    powers = ((limit + 1) ** (2 / (bins - 2))) ** torch.arange(1, bins // 2, device=scale.device) - 1
    outward = torch.cat([powers, 2 * limit])
    return torch.cat([-outward.flip(0), torch.zeros_like(limit), outward]) / scale


class GroupDecoder(HFQueryDecoder):
    """RF-DETR's and LW-DETR's: the heads are outside, and in training there are several groups of queries."""

    def own_boxes(self, call: Call) -> Tensor:
        """Those of the group that predicts."""
        return self._own(call.kwargs[BOXES]).detach().float()

    def _own(self, queries: Tensor) -> Tensor:
        return queries[:, : self.net.config.num_queries]

    def _answers(self, output: Any, boxes: Tensor) -> Answers:
        states = output.last_hidden_state
        deltas = self.net.bbox_embed(states).float()
        centers, sides = boxes.chunk(2, dim=-1)
        found = torch.cat([centers + deltas[..., :2] * sides, sides * deltas[..., 2:].exp()], dim=-1)
        return Answers(self.net.class_embed(states).float(), found)


class AnchorDecoder(HFQueryDecoder):
    """DAB-DETR's: a query is an anchor box, and its content is zero at first."""

    @staticmethod
    def fits(settings: Any) -> bool:
        """Without `num_patterns`, by which several queries share a box."""
        return not settings.num_patterns

    def own_boxes(self, call: Call) -> Tensor:
        """The learned anchors; they are given before their sigmoid."""
        anchors: Tensor = call.kwargs["query_position_embeddings"]
        return anchors.detach().float().sigmoid()

    def _queries(self, call: Call, boxes: Tensor) -> dict[str, Tensor]:
        content = call.kwargs[CONTENT]
        return {
            CONTENT: content.new_zeros(*boxes.shape[:2], content.shape[-1]),
            "query_position_embeddings": boxes.logit(eps=1e-5),
        }

    def _answers(self, output: Any, boxes: Tensor) -> Answers:
        states = output.intermediate_hidden_states[-1]
        refined = self.net.bbox_predictor(states).float() + output.reference_points[-1].float().logit(eps=1e-5)
        return Answers(self.net.class_embed(states).float(), refined.sigmoid())


class TwoStageDecoder(HFQueryDecoder):
    """Two-stage Deformable DETR's: position and content of a query are functions of its box."""

    @staticmethod
    def fits(settings: Any) -> bool:
        """Where a first stage gives the boxes; otherwise a query is a learned vector that points at a place."""
        return bool(settings.two_stage)

    def own_boxes(self, call: Call) -> Tensor:
        """The chosen proposals of the encoder."""
        proposals: Tensor = call.kwargs[BOXES]
        return proposals.detach().float()

    def _queries(self, call: Call, boxes: Tensor) -> dict[str, Tensor]:
        model = self.net.model
        embedded = model.pos_trans_norm(model.pos_trans(model.get_proposal_pos_embed(boxes.logit(eps=1e-5))))
        position, content = embedded.chunk(2, dim=-1)
        return {CONTENT: content, "object_queries_position_embeddings": position, BOXES: boxes}

    def _answers(self, output: Any, boxes: Tensor) -> Answers:
        states, last = output.last_hidden_state, self.net.config.decoder_layers - 1
        starts = output.intermediate_reference_points[:, last - 1].float() if last else boxes
        refined = self.net.bbox_embed[last](states).float() + starts.logit(eps=1e-5)
        return Answers(self.net.class_embed[last](states).float(), refined.sigmoid())


DECODERS: Mapping[Decoder, type[HFQueryDecoder]] = {
    "hybrid": HybridDecoder, "groups": GroupDecoder, "anchors": AnchorDecoder, "two_stage": TwoStageDecoder,
}  # fmt: skip
"""By a kind's `decoder`."""

"""STCA-FF: what the masks need of the fused feature map, without ever computing it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acamkd.losses.acam.sparse_attention import Condensed, cross_attention, heavy_hitters, probes_of, window_side
from acamkd.losses.functional import safe_divide


class STCAFF(nn.Module):
    """Student-teacher cross-attention feature fusion, F = A V, with one feature map as query and one as key and value.

    The masks read two things of F: its average over locations, and its products with the spatial units. Both are
    linear in V, so that neither F nor V is computed: (A V)^T m = A (V^T m), and the average of F is V times the average
    row of A.

    With windows (`kv_stride`), the locations that get most attention stay keys of their own. Of the others each window
    is one key: the mean of its locations, which counts as many times. A query may attend more to some locations of a
    window than to others. `_condensed` puts that back to first order.

    Args:
        channels: C, of both feature maps.
        kv_stride: Side of the windows, or `auto` for `window_side`; 1 is the paper.
        normalize: Layer norm of both feature maps first, over the channels of each location and without parameters.
        average: Whether the average of F is asked for, which channel masks alone read.
    """

    def __init__(
        self, channels: int, kv_stride: int | Literal["auto"] = 1, normalize: bool = False, average: bool = True
    ) -> None:
        super().__init__()
        self.kv_stride = kv_stride
        self.normalize = normalize
        self.average = average
        query_channels = max(1, channels // 2)
        self.query = nn.Conv2d(channels, query_channels, kernel_size=1)
        self.key = nn.Conv2d(channels, query_channels, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, query_map: Tensor, key_value_map: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse two feature maps, and look at the result F through units.

        Args:
            query_map: (N, C, H, W).
            key_value_map: (N, C, H, W).
            units: (M, C).

        Returns:
            The average of F, (N, C), or (N, 0) where none is asked for; and F's products with the units, (N, M, H, W).
        """
        if self.normalize:
            query_map, key_value_map = layer_norm(query_map), layer_norm(key_value_map)
        weight, bias = self.value.weight.flatten(1), self.value.bias
        assert bias is not None
        readout = units @ weight  # (M, C)
        side = window_side(key_value_map.shape[2:]) if self.kv_stride == "auto" else self.kv_stride
        if side == 1:
            sources = key_value_map.flatten(2)
            query, key = self.query(query_map).flatten(2), self.key(key_value_map).flatten(2)
            scaled = key * query.shape[1] ** -0.5
            averaged = sources if self.average else None
            read, average = cross_attention(query, scaled, readout @ sources, averaged=averaged)
        else:
            read, average = self._condensed(query_map, key_value_map, readout, side)
        logits = read + (units @ bias).unsqueeze(1)  # the rows of A sum to 1, so that the bias of V is one of F
        fused = logits.new_empty(len(logits), 0) if average is None else F.linear(average, weight, bias)
        return fused, logits.reshape(*logits.shape[:2], *query_map.shape[-2:])

    def _condensed(
        self, query_map: Tensor, key_value_map: Tensor, readout: Tensor, side: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over K windows and single locations.

        Where that is cheaper, the queries W_q T + b are not computed either: Q^T K = T^T (W_q^T K) + b^T K.

        What a mean over a window leaves out is m F_i += a_i m E[dV dK^T] q_i / sqrt(C_q), to first order in the query.
        E is the covariance of keys and values within windows, averaged over all of them. a_i is the attention that
        query i pays to windows. The shift is damped to stay below the standard deviation of m V within windows. No
        weighted mean over a window can differ by much more from the plain one.

        Returns:
            A V seen through the units, (N, M, HW); and the average of A times the keys' sources, (N, C), if asked for.
        """
        scale = self.query.out_channels**-0.5
        to_key = self.key.weight.flatten(1) * scale  # (C_q, C)
        probes = to_key.mT @ self.query(probes_of(query_map)).flatten(2)
        keys = Condensed.of(key_value_map, side, heavy_hitters(key_value_map, probes))
        singles, images = keys.singles.shape[2], len(query_map)
        sources = torch.cat([keys.means, keys.singles], dim=2)
        in_windows = F.pad(torch.ones_like(keys.counts), (0, singles)).unsqueeze(1)
        values = torch.cat([readout @ sources, in_windows], dim=1)
        # The covariance is that of the feature map; what keys and values make of it is linear.
        varied = keys.covariance(readout.mT.expand(images, -1, -1))  # (N, C, M)
        asked = torch.cat([self.key(sources.unsqueeze(3)).flatten(2) * scale, to_key @ varied], dim=2)
        if sources.shape[2] <= 2 * sources.shape[1]:
            assert self.query.bias is not None
            queries, biases = query_map.flatten(2), self.query.bias @ asked
            asked = self.query.weight.flatten(1).mT @ asked
        else:
            queries, biases = self.query(query_map).flatten(2), asked.new_zeros(())
        by_keys, by_shift = torch.split(asked, [sources.shape[2], varied.shape[2]], dim=2)
        biases = biases.expand(images, asked.shape[2])
        # n exp(q k) = exp(q k + log n); a window without locations is out of reach.
        offset = biases[:, : sources.shape[2]] + F.pad(keys.counts, (0, singles), value=1.0).log()
        averaged = sources if self.average else None
        read, average = cross_attention(queries, by_keys, values, offset=offset, averaged=averaged)
        shift = by_shift.mT @ queries + biases[:, sources.shape[2] :].unsqueeze(2)
        variance = (readout.mT * varied).sum(dim=1).unsqueeze(2)  # of m V within windows
        shift = shift * torch.rsqrt(1 + safe_divide(shift.square(), variance))
        return read[:, :-1] + read[:, -1:] * shift, average


def layer_norm(x: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the channels of each location, (N, C, H, W)."""
    return F.layer_norm(x.movedim(1, 3), x.shape[1:2]).movedim(3, 1)

"""What ACAM allocates: never a dense map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from acamkd.losses.acam import sparse_attention as attention
from tiny_maps import joint, maps


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the number of elements of the largest tensor that any operator gives, backward included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(x.numel() for x in _tensors(result)), 0)
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    for each in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(each, Tensor):
            yield each


@pytest.mark.parametrize("options", [{}, {"kv_stride": 2}, {"kv_stride": "auto"}, {"query": "student"}], ids=str)
def test_nothing_is_ever_as_large_as_the_dense_maps(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    n, channels, side = 2, 32, 60
    one_map = n * channels * side**2
    monkeypatch.setattr(attention, "BLOCK", one_map)
    student, teacher = maps(n, channels, channels, side, side, torch.float32)
    loss, saved = joint(channels, channels, **options), [0]

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _Largest() as largest:
        torch.stack(list(loss(student, teacher).values())).sum().backward()  # type: ignore[no-untyped-call]
    assert max(saved) <= one_map
    assert largest.numel <= 2 * one_map  # 1/56 of the attention map, and 1/3 of one (N, M, C, H, W)
    assert 2 * one_map < min(n * (side**2) ** 2 // 50, n * 6 * channels * side**2 // 2)

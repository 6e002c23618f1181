"""The smallest networks of transformers, by model type: what a recipe's `options` would say."""

from __future__ import annotations

from typing import Any

import torch

from acamkd import config, models
from acamkd.models.base import Batch, TaskModel
from acamkd.models.hf_kinds import KINDS

RESNET: dict[str, Any] = {
    "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic",
}  # fmt: skip
CNN: dict[str, Any] = {"model_type": "resnet", **RESNET}
HGNET: dict[str, Any] = {
    "model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 24, 32],
    "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 24, 32, 32], "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2], "hidden_sizes": [16, 24, 32, 32], "out_indices": [2, 3, 4],
}  # fmt: skip
RT_DETR: dict[str, Any] = {
    "backbone_config": {"model_type": "rt_detr_resnet", **RESNET, "out_indices": [2, 3, 4]},
    "encoder_in_channels": [8, 16, 16], "encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32], "d_model": 32,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "decoder_layers": 2, "num_queries": 20, "num_denoising": 4, "freeze_backbone_batch_norms": False,
}  # fmt: skip
D_FINE: dict[str, Any] = {
    **RT_DETR, "backbone_config": HGNET, "encoder_in_channels": [24, 32, 32], "depth_mult": 0.34, "lqe_hidden_dim": 16,
}  # fmt: skip
DETR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 20, "backbone_config": CNN,
}  # fmt: skip
LW_DETR: dict[str, Any] = {
    "d_model": 32, "decoder_ffn_dim": 32, "decoder_layers": 2, "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2, "num_queries": 20, "group_detr": 2,
}  # fmt: skip
WIDTH: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}
VIT: dict[str, Any] = {**WIDTH, "num_hidden_layers": 4, "intermediate_size": 32, "image_size": 128}
SHORT: dict[str, Any] = {**WIDTH, "num_hidden_layers": 2, "out_indices": [1, 2], "image_size": 128}
QUERIES: dict[str, Any] = {"num_queries": 10, "train_num_points": 256}
EOMT: dict[str, Any] = {**WIDTH, **QUERIES, "num_hidden_layers": 4, "num_blocks": 1, "num_register_tokens": 1}

OPTIONS: dict[str, dict[str, Any]] = {
    "rt_detr": RT_DETR,
    "rt_detr_v2": RT_DETR,
    "d_fine": D_FINE,
    "deimv2": D_FINE,
    "rf_detr": {
        **LW_DETR, "backbone_config": {"model_type": "rf_detr_dinov2", **SHORT, "patch_size": 16, "num_windows": 2},
    },
    "lw_detr": {
        **LW_DETR, "projector_scale_factors": [1.0],
        "backbone_config": {
            "model_type": "lw_detr_vit", **SHORT, "pretrain_image_size": 128, "num_windows": 4,
            "window_block_indices": [0],
        },
    },
    "deformable_detr": {**DETR, "backbone_config": {**CNN, "out_indices": [2, 3, 4]}},
    "detr": DETR,
    "conditional_detr": DETR,
    "dab-detr": {**{name: value for name, value in DETR.items() if name != "d_model"}, "hidden_size": 32},
    "yolos": {**VIT, "image_size": [128, 128], "num_detection_tokens": 20},
    "segformer": {
        "depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
    },
    "upernet": {
        "backbone_config": {**CNN, "out_indices": [1, 2, 3, 4]}, "hidden_size": 16, "auxiliary_channels": 8,
        "auxiliary_in_channels": 16,
    },
    "dpt": {
        **VIT, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16,
    },
    "beit": {**VIT, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 8},
    "mobilevit": {
        "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [4, 8, 8, 8, 8, 8, 32], "num_attention_heads": 2,
        "aspp_out_channels": 16, "image_size": 128,
    },
    "mask2former": {
        **QUERIES, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32,
        "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 32,
        "backbone_config": {
            "model_type": "swin", "image_size": 128, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2],
            "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    },
    "eomt": EOMT,
    "eomt_dinov3": {**EOMT, "intermediate_size": 32},
}  # fmt: skip

assert OPTIONS.keys() == KINDS.keys()


TWO_STAGE: dict[str, Any] = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 20}
"""Options by which Deformable DETR's queries start from boxes."""


def detector(kind: str, seed: int = 0, **options: Any) -> TaskModel:
    """A tiny detector with 3 classes, whose boxes and classes differ from query to query."""
    torch.manual_seed(seed)
    model = models.build(config.Model(arch=f"hf/{kind}", options={**OPTIONS[kind], **options}), "detection", 3)
    for name, parameter in model.net.named_parameters():
        if any(part in name for part in ("bbox", "class_embed", "score_head", "enc_out")) and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(model: TaskModel, *, labeled: bool = True) -> Batch:
    """Two images of different sizes, one object in the first."""
    images = [torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(1)), torch.rand(3, 40, 64)]
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]), "labels": torch.tensor([2])}
    return model.prepare(images, [target, {name: x[:0] for name, x in target.items()}] if labeled else None)

"""Small models of transformers itself, every tensor random, saved as users find them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

PATCH, GRID = 8, 5
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 56,
    "image_size": PATCH * GRID,
    "patch_size": PATCH,
}
TEXT = {**SIZES, "num_hidden_layers": 1, "vocab_size": 99, "max_position_embeddings": 8}


@dataclass(frozen=True)
class Sample:
    """A model of the library: its class, its configuration, and where the encoder lies in it."""

    model: str
    configuration: str
    options: dict[str, Any] = field(default_factory=dict)
    encoder: str = ""
    ignored: int = 0  # tensors outside the encoder
    prefix: int = 1  # tokens before the patches

    def configured(self) -> Any:
        kind = getattr(transformers, self.configuration)
        if not self.configuration.endswith(("CLIPConfig", "SiglipConfig")):
            return kind(**SIZES | self.options)
        return kind(vision_config=SIZES | self.options, text_config=TEXT)

    def made(self) -> nn.Module:
        model: nn.Module = getattr(transformers, self.model)(self.configured()).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + around)
        return model


BIASES = {"use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True}
HEADLESS = {"use_mean_pooling": False, "use_mask_token": True}

SAMPLES = {
    "DINOv2": Sample("Dinov2Model", "Dinov2Config"),
    "DINOv2 with SwiGLU": Sample("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
    "DINOv2 without biases": Sample("Dinov2Model", "Dinov2Config", {"qkv_bias": False, "use_mask_token": False}),
    "DINOv2 classifier": Sample("Dinov2ForImageClassification", "Dinov2Config", {}, "dinov2", 2),
    "DINOv2 with registers": Sample(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"num_register_tokens": 3}, prefix=4
    ),
    "DINOv3": Sample("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 2}, prefix=3),
    "DINOv3 gated": Sample(
        "DINOv3ViTModel", "DINOv3ViTConfig", {"use_gated_mlp": True, "hidden_act": "silu", "key_bias": True}
    ),
    "ViT": Sample("ViTModel", "ViTConfig", ignored=2),
    "ViT classifier": Sample("ViTForImageClassification", "ViTConfig", {"qkv_bias": False}, "vit", 2),
    "ViT of SimMIM": Sample("ViTForMaskedImageModeling", "ViTConfig", {"hidden_act": "gelu_new"}, "vit", 2),
    "DeiT": Sample("DeiTModel", "DeiTConfig", ignored=2, prefix=2),
    "MAE": Sample("ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0}),
    "MAE with its decoder": Sample(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {"mask_ratio": 0.0, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
        "vit",
        24,
    ),
    "MSN": Sample("ViTMSNModel", "ViTMSNConfig"),
    "MSN classifier": Sample("ViTMSNForImageClassification", "ViTMSNConfig", {}, "vit", 2),
    "BEiT": Sample("BeitModel", "BeitConfig", BIASES, ignored=2),
    "BEiT with shared biases": Sample("BeitModel", "BeitConfig", SHARED | HEADLESS),
    "BEiT without LayerScale": Sample("BeitModel", "BeitConfig", {"layer_scale_init_value": 0.0}, ignored=2),
    "BEiT classifier": Sample("BeitForImageClassification", "BeitConfig", BIASES, "beit", 4),
    "Data2Vec": Sample("Data2VecVisionModel", "Data2VecVisionConfig", BIASES),
    "Data2Vec with shared biases": Sample("Data2VecVisionModel", "Data2VecVisionConfig", SHARED | HEADLESS),
    "CLIP": Sample("CLIPVisionModel", "CLIPVisionConfig"),
    "CLIP with projection": Sample("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}, "vision_model", 1),
    "CLIP with its text": Sample("CLIPModel", "CLIPConfig", {}, "vision_model", 23),
    "SigLIP": Sample("SiglipVisionModel", "SiglipVisionConfig", ignored=11, prefix=0),
    "SigLIP with its text": Sample("SiglipModel", "SiglipConfig", {}, "vision_model", 35, prefix=0),
    "SigLIP 2": Sample("Siglip2VisionModel", "Siglip2VisionConfig", {"num_patches": GRID**2}, ignored=11, prefix=0),
    "I-JEPA": Sample("IJepaModel", "IJepaConfig", prefix=0),
    "I-JEPA classifier": Sample("IJepaForImageClassification", "IJepaConfig", {}, "ijepa", 2, prefix=0),
}

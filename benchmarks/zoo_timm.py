"""timm's networks in the zoo."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from reversa.errors import import_extra
from zoo_models import CLASSES, Case, images


def timm_model(more: int, architecture: str, depth: Callable[[int], dict[str, Any]], **settings: Any) -> nn.Module:
    timm = import_extra("timm", "timm")
    return timm.create_model(architecture, pretrained=False, num_classes=CLASSES, **settings, **depth(more))


def timm_case(
    architecture: str, stages: tuple[int, ...], depth: Callable[[int], dict[str, Any]], side: int = 64, **settings: Any
) -> Case:
    """An image size of one's own is not in what a model of timm tells."""
    make = partial(timm_model, architecture=architecture, depth=depth, **settings)
    return Case(architecture, make, images(side), stages, example="img_size" in settings)


def timm_class(module: str, name: str, *args: Any, **settings: Any) -> nn.Module:
    """For what a registered name leaves no choice of."""
    return getattr(import_extra(f"timm.models.{module}", "timm"), name)(*args, **settings)


def nf_resnet(more: int) -> nn.Module:
    settings = {"depths": (3, 3 + more, 1, 1), "channels": (16, 24, 32, 40), "stem_type": "7x7_pool", "stem_chs": 8}
    cfg = timm_class("nfnet", "NfCfg", **settings)
    return timm_class("nfnet", "NormFreeNet", cfg, num_classes=CLASSES, drop_path_rate=0.5)


def timm_regnet(more: int) -> nn.Module:
    """Stages of 1, 1, 3 and 3 blocks; those that are added fall into the last."""
    cfg = timm_class("regnet", "RegNetCfg", 8 + more, 16, 16.0, 2.0, 8, se_ratio=0.25, stem_width=8)
    return timm_class("regnet", "RegNet", cfg, num_classes=CLASSES, drop_path_rate=0.5)


def mixer(more: int) -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 4 + more}
    sizes |= {"num_classes": CLASSES, "proj_drop_rate": 0.1, "drop_path_rate": 0.5}
    return timm_class("mlp_mixer", "MlpMixer", **sizes)


def poolformer(more: int) -> nn.Module:
    """With the settings that its registered name has."""
    norm = import_extra("timm.models.metaformer", "timm").GroupNorm1
    own: dict[str, Any] = {"mlp_act": nn.GELU, "mlp_bias": True, "norm_layers": norm, "use_mlp_head": False}
    own |= {"downsample_norm": None, "layer_scale_init_values": 1e-5, "res_scale_init_values": None}
    sizes: dict[str, Any] = {"depths": (2, 3 + more), "dims": (8, 16), "num_classes": CLASSES}
    return timm_class("metaformer", "MetaFormer", **sizes, **own, proj_drop_rate=0.1, drop_path_rate=0.5)


def timm_efficientnet(more: int) -> nn.Module:
    rows = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r3_k3_s2_e6_c12_se0.25"], [f"ir_r{4 + more}_k5_s2_e6_c16_se0.25"]]
    sizes: dict[str, Any] = {"num_classes": CLASSES, "num_features": 32, "stem_size": 8}
    blocks = timm_class("efficientnet", "decode_arch_def", rows)
    return timm_class("efficientnet", "EfficientNet", blocks, **sizes, drop_rate=0.2, drop_path_rate=0.5)


def timm_cases() -> list[Case]:
    nets: dict[str, Any] = {"depth": lambda n: {"layers": (3, 3 + n, 1, 1)}, "drop_path_rate": 0.5, "stages": (2, 2)}
    small: dict[str, Any] = {"channels": (8, 16, 24, 32), "stem_width": 8}
    sized: dict[str, Any] = {"img_size": 32, "side": 32, "proj_drop_rate": 0.1, "drop_path_rate": 0.5}
    vits: dict[str, Any] = sized | {
        "depth": lambda n: {"depth": 4 + n},
        "attn_drop_rate": 0.1,
        "patch_size": 8,
        "embed_dim": 16,
    }
    vits |= {"num_heads": 2, "stages": (4,)}
    cait: dict[str, Any] = vits | {"stages": (4, 2)}  # two more, which take the class token to the patches
    deep: dict[str, Any] = {"depth": lambda n: {"depths": (2, 3 + n, 1, 1)}, "stages": (2, 3), "drop_path_rate": 0.5}
    deep |= {"dims": (8, 16, 16, 16)}
    swins: dict[str, Any] = sized | {"depth": lambda n: {"depths": (2, 4 + n)}, "attn_drop_rate": 0.1, "window_size": 4}
    swins |= {"num_heads": (2, 4), "stages": (2, 4), "embed_dim": 8}
    levit: dict[str, Any] = {"embed_dim": (16, 24, 32), "key_dim": 4, "num_heads": (2, 3, 4), "drop_path_rate": 0.5}
    return [
        timm_case("resnet50", **nets, **small),
        timm_case("seresnet50", **nets, **small),
        timm_case("resnetv2_50", **nets, channels=(32, 48, 64, 80), stem_chs=8),
        Case("nf_resnet50", nf_resnet, images(64), (2, 2), example=True),
        timm_case("vit_small_patch16_224", **vits, init_values=1e-5),
        timm_case("deit3_small_patch16_224", **vits),
        timm_case("beit_base_patch16_224", **vits, use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
        timm_case("beitv2_base_patch16_224", **vits),
        timm_case("eva02_tiny_patch14_224", **vits),
        timm_case("cait_xxs24_224", **cait),
        timm_case("vit_small_patch16_18x2_224", **vits),
        Case("mixer_s32_224", mixer, images(32), (4,), example=True),
        timm_case("convnext_tiny", **deep),
        timm_case("convnextv2_nano", **deep),
        timm_case("swin_tiny_patch4_window7_224", **swins),
        timm_case("swinv2_tiny_window8_256", **swins),
        Case("poolformer_s12", poolformer, images(64), (2, 3), example=True),
        timm_case("levit_128s", (2, 3, 3), lambda n: {"depth": (2, 3 + n, 3)}, 96, img_size=96, **levit),
        Case("regnety_004", timm_regnet, images(64), (2, 2), example=True),
        Case("efficientnet_b0", timm_efficientnet, images(64), (2, 3), example=True),
        timm_case("densenet121", (), lambda n: {"block_config": (2, 2 + n)}, growth_rate=8, drop_rate=0.1),
    ]  # fmt: skip

"""The models of the zoo: other people's networks at a size that takes a second, and what each should be found to be.

Every constructor is the library's own; only numbers of layers and channels are small. Dropout, stochastic depth and
LayerDrop are on wherever a model has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision.models as tv
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.mobilenetv3 import InvertedResidualConfig

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
BATCH, CLASSES = 3, 5


@dataclass(frozen=True)
class Case:
    """A model and what conversion should find in it, by the library's own source.

    Attributes:
        name: library and model.
        make: the model with so many more blocks in a stage than its smallest form.
        inputs: arguments of one training step, in float64.
        stages: lengths of the stages in the smallest form; none for a model that has no residual block.
        random: whether blocks of its stages draw random numbers.
        example: whether the finder is given these inputs, where the model does not tell its own.
    """

    name: str
    make: Callable[[int], nn.Module]
    inputs: Callable[[], Inputs]
    stages: tuple[int, ...]
    random: bool = True
    example: bool = False


def floats(*shape: int, batch: int = BATCH) -> Inputs:
    return (torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True),), {}


def images(side: int) -> Callable[[], Inputs]:
    return partial(floats, 3, side, side)


def clip(frames: int, side: int) -> Callable[[], Inputs]:
    return partial(floats, 3, frames, side, side, batch=2)


# ------------------------------------------------------------------ torchvision


def resnet(block: type[nn.Module], *layers: int, **settings: Any) -> Callable[[int], nn.Module]:
    """More blocks go into the first stage."""
    return lambda more: tv.ResNet(block, [layers[0] + more, *layers[1:]], num_classes=CLASSES, **settings)  # type: ignore[arg-type]


bottlenecks = partial(resnet, tv.resnet.Bottleneck, width_per_group=16)
DILATED: dict[str, Any] = {"replace_stride_with_dilation": [False, True, True], "width_per_group": 16}


def segmentation(head: Callable[[int, int], nn.Module], kind: Any, more: int) -> nn.Module:
    """A head on layer2 and, for FCN, one more on layer1: the outputs of whole stages are tapped."""
    backbone = resnet(tv.resnet.Bottleneck, 3, 3, 1, 1, **DILATED)(more)
    features = IntermediateLayerGetter(backbone, {"layer2": "out", "layer1": "aux"})
    return kind(features, head(512, CLASSES), tv.segmentation.fcn.FCNHead(256, CLASSES))


def regnet(more: int) -> nn.Module:
    params = tv.regnet.BlockParams([1, 3 + more, 3], [16, 24, 32], [8, 8, 8], [1.0, 1.0, 1.0], [2, 2, 2], se_ratio=0.25)
    return tv.RegNet(params, num_classes=CLASSES, stem_width=8)


def convnext(more: int) -> nn.Module:
    sizes = tv.convnext.CNBlockConfig
    settings = [sizes(8, 16, 3 + more), sizes(16, None, 3)]
    return tv.ConvNeXt(settings, stochastic_depth_prob=0.5, num_classes=CLASSES)


def vit(more: int) -> nn.Module:
    return tv.VisionTransformer(
        32, 8, 4 + more, 2, 16, 32, dropout=0.1, attention_dropout=0.1, num_classes=CLASSES
    )  # fmt: skip


SWIN: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 8, "num_heads": [2, 4], "window_size": [4, 4]}
SWIN |= {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth_prob": 0.5, "num_classes": CLASSES}


def swin(more: int, **settings: Any) -> nn.Module:
    return tv.SwinTransformer(depths=[2, 4 + more], **SWIN, **settings)


SWIN_V2: dict[str, Any] = {
    "block": tv.swin_transformer.SwinTransformerBlockV2,
    "downsample_layer": tv.swin_transformer.PatchMergingV2,
}


def efficientnet(*rows: tuple[Any, ...], more: int) -> nn.Module:
    """Rows of kind, expansion, kernel, stride, channels in, channels out and layers; more layers go into the last."""
    last = (*rows[-1][:-1], rows[-1][-1] + more)
    settings = [kind(*row) for kind, *row in (*rows[:-1], last)]
    return tv.EfficientNet(settings, dropout=0.2, stochastic_depth_prob=0.5, num_classes=CLASSES, last_channel=32)


MB, FUSED = tv.efficientnet.MBConvConfig, tv.efficientnet.FusedMBConvConfig
V1 = (MB, 1, 3, 1, 8, 8, 1), (MB, 6, 3, 2, 8, 12, 3), (MB, 6, 5, 2, 12, 16, 4)
V2 = (FUSED, 1, 3, 1, 8, 8, 2), (FUSED, 4, 3, 2, 8, 16, 3), (MB, 4, 3, 2, 16, 24, 4)


def mobilenet_v2(more: int) -> nn.Module:
    settings = [[1, 16, 1, 1], [6, 24, 3, 2], [6, 32, 4 + more, 2]]
    return tv.MobileNetV2(num_classes=CLASSES, width_mult=0.5, inverted_residual_setting=settings, dropout=0.2)


def mobilenet_v3(more: int) -> nn.Module:
    row = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    first = [row(16, 3, 16, 16, False, "RE", stride=1), row(16, 3, 48, 24, False, "RE", stride=2)]
    second = [row(24, 3, 48, 24, False, "RE", stride=1)] * 2 + [row(24, 5, 48, 32, True, "HS", stride=2)]
    third = [row(32, 5, 64, 32, True, "HS", stride=1)] * (2 + more)
    return tv.MobileNetV3([*first, *second, *third], last_channel=48, num_classes=CLASSES, dropout=0.2)


def maxvit(more: int) -> nn.Module:
    return tv.MaxVit(
        (32, 32), 8, 4, [8, 16], [2, 4 + more], 4, stochastic_depth_prob=0.5, mlp_dropout=0.1, attention_dropout=0.1,
        num_classes=CLASSES,
    )  # fmt: skip


def mvit(more: int, residual: bool, rel_pos: bool) -> nn.Module:
    """MViT v1 and v2: a block that pools, then blocks that do not."""
    row = partial(tv.video.mvit.MSBlockConfig, 2, kernel_kv=[3, 3, 3], stride_kv=[1, 2, 2])
    first = row(8, 16, kernel_q=[3, 3, 3], stride_q=[1, 2, 2])
    rest = [row(16, 16, kernel_q=[], stride_q=[])] * (3 + more)
    noise: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.1, "stochastic_depth_prob": 0.5}
    return tv.video.MViT(
        (32, 32), 4, [first, *rest], residual_pool=residual, residual_with_cls_embed=not residual,
        rel_pos_embed=rel_pos, proj_after_attn=residual, num_classes=CLASSES, **noise,
    )  # fmt: skip


def video(conv: Any, stem: Any, more: int) -> nn.Module:
    layers = [3 + more, 1, 1, 1]
    return tv.video.VideoResNet(tv.video.resnet.BasicBlock, [conv] * 4, layers, stem, num_classes=CLASSES)


def densenet(more: int) -> nn.Module:
    return tv.DenseNet(8, (2, 2, 2, 2 + more), 8, num_classes=CLASSES)


def torchvision_cases() -> list[Case]:
    kinds = tv.video.resnet
    plain = partial(Case, inputs=images(64), random=False)
    noisy = partial(Case, inputs=images(64))
    films = partial(Case, inputs=clip(4, 32))
    return [
        plain("resnet18", resnet(tv.resnet.BasicBlock, 3, 3, 1, 1), stages=(3, 2)),
        plain("resnet101", bottlenecks(3, 4, 5, 1), stages=(2, 3, 4)),
        plain("resnext50", bottlenecks(3, 3, 1, 1, groups=4), stages=(2, 2)),
        plain("wide_resnet50_2", resnet(tv.resnet.Bottleneck, 3, 3, 1, 1, width_per_group=32), stages=(2, 2)),
        plain("deeplabv3", partial(segmentation, tv.segmentation.deeplabv3.DeepLabHead, tv.segmentation.DeepLabV3),
              stages=(2, 2)),
        plain("fcn", partial(segmentation, tv.segmentation.fcn.FCNHead, tv.segmentation.FCN), stages=(2, 2)),
        plain("regnet_y", regnet, stages=(2, 2)),
        noisy("convnext", convnext, stages=(3, 3)),
        noisy("vit", vit, inputs=images(32), stages=(4,)),
        noisy("swin", swin, stages=(2, 4)),
        noisy("swin_v2", partial(swin, **SWIN_V2), stages=(2, 4)),
        noisy("efficientnet_b0", lambda more: efficientnet(*V1, more=more), stages=(2, 3)),
        noisy("efficientnet_v2", lambda more: efficientnet(*V2, more=more), stages=(2, 2, 3)),
        plain("mobilenet_v2", mobilenet_v2, stages=(2, 3)),
        plain("mobilenet_v3", mobilenet_v3, stages=(2, 2)),
        noisy("maxvit", maxvit, inputs=images(32), stages=(2, 3, 2, 3), example=True),
        films("mvit_v1", partial(mvit, residual=False, rel_pos=False), stages=(3,), example=True),
        films("mvit_v2", partial(mvit, residual=True, rel_pos=True), stages=(3,), example=True),
        films("r3d_18", partial(video, kinds.Conv3DSimple, kinds.BasicStem), stages=(3,), random=False),
        films("r2plus1d_18", partial(video, kinds.Conv2Plus1D, kinds.R2Plus1dStem), stages=(3,), random=False),
        plain("vgg11_bn", lambda more: tv.vgg11_bn(num_classes=CLASSES), stages=()),
        plain("densenet", densenet, stages=()),
    ]  # fmt: skip


# ------------------------------------------------------------------ torch.nn


def transformer_inputs(*lengths: int) -> Callable[[], Inputs]:
    return lambda: (tuple(torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True) for n in lengths), {})


def padded() -> Inputs:
    args, _ = transformer_inputs(6)()
    return args, {"src_key_padding_mask": torch.tensor([[False] * 6, [False] * 4 + [True] * 2])}


def causal() -> Inputs:
    args, _ = transformer_inputs(6, 5)()
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    return args, {"tgt_mask": mask, "tgt_is_causal": True}


def encoder(more: int, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 4 + more, enable_nested_tensor=False)


def decoder(more: int) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.1, batch_first=True), 4 + more)


def transformer(more: int) -> nn.Module:
    return nn.Transformer(16, 2, 3 + more, 3 + more, 32, dropout=0.1, batch_first=True)


def torch_cases() -> list[Case]:
    return [
        Case("TransformerEncoder, post-norm", partial(encoder, norm_first=False), padded, (4,)),
        Case("TransformerEncoder, pre-norm", partial(encoder, norm_first=True), padded, (4,)),
        Case("TransformerDecoder", decoder, transformer_inputs(6, 5), (4,)),
        Case("Transformer", transformer, causal, (3, 3)),
    ]

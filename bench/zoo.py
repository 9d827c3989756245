"""The networks of the coverage tables: torchvision's, and one or two of each family in timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprune import models
from fastprune.adapters.torchvision import DenseNetwork, RegionNetwork, make_boxes

TRANSFORMERS = ("vit_", "swin_", "maxvit_")  # of torchvision's classification networks

TIMM = """
    resnet18 resnet26t resnet50d resnext50_32x4d resnetaa34d resnetblur18 resnetrs50 resnet50_gn seresnet18
    senet154 seresnext26d_32x4d legacy_seresnet18 legacy_senet154 ecaresnet26t ecaresnet50d res2net50_14w_8s
    res2next50 resnest14d resnest26d resnest50d_4s2x40d skresnet18 skresnext50_32x4d regnetx_002 regnety_002
    regnetz_005 regnetv_040 regnety_040_sgn densenet121 densenetblur121d vgg11 vgg11_bn inception_v3
    inception_v4 inception_resnet_v2 legacy_xception xception41 xception41p nasnetalarge pnasnet5large dla34
    dla46x_c dla60_res2net dla60_res2next dpn48b dpn68b hrnet_w18_small hrnet_w18_ssld cspresnet50 cspresnext50
    cspdarknet53 cs3darknet_focus_s cs3darknet_s cs3edgenet_x cs3sedarknet_xdw cspnext_tiny darknet17 darknet53
    darknetaa53 sedarknet21 vovnet39a ese_vovnet19b_slim ese_vovnet19b_dw eca_vovnet39b selecsls42 rexnet_100
    rexnetr_100 ghostnet_050 ghostnetv2_100 ghostnetv3_050 mobilenetv1_100 mobilenetv1_100h mobilenetv2_050
    mobilenetv3_small_050 mobilenetv3_large_100 mobilenetv4_conv_small mobilenetv4_conv_aa_medium
    mobilenetv4_hybrid_medium mobilenetv5_base mnasnet_small mnasnet_100 semnasnet_075 spnasnet_100 fbnetc_100
    fbnetv3_b lcnet_050 lcnetv2_small hardcorenas_a tinynet_e mixnet_s mixnet_l tf_mixnet_s efficientnet_b0
    tf_efficientnet_b0 efficientnet_lite0 efficientnet_es efficientnetv2_rw_t efficientnetv2_s
    tf_efficientnetv2_b0 gc_efficientnetv2_rw_t efficientnet_cc_b0_4e efficientnet_blur_b0 efficientnet_b0_gn
    gernet_s repvgg_a0 repvgg_d2se mobileone_s0 mobileone_s1 resnet33ts seresnet33ts gcresnet50t gcresnext26ts
    eca_resnext26ts bat_resnext26ts regnetz_b16 resnet51q resnet50_clip hgnet_tiny hgnetv2_b0 nf_resnet26
    nf_regnet_b0 nf_ecaresnet26 nf_seresnet26 dm_nfnet_f0 nfnet_l0 eca_nfnet_l0 resnetv2_18 resnetv2_50
    resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_frn convnext_atto convnext_atto_ols convnext_tiny_hnf
    convnextv2_atto convnext_zepto_rms inception_next_atto convmixer_768_32 mambaout_femto fasternet_t0
    poolformer_s12 poolformerv2_s12 convformer_s18 edgenext_xx_small fastvit_t8 fastvit_sa12 repghostnet_050
    starnet_s1 starnet_s050 repvit_m0_9 tresnet_m shvit_s1 rdnet_tiny levit_128s levit_conv_128s
    efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_l1 efficientvit_m0 mobilevit_xxs
    mobilevitv2_050 swiftformer_xs lowformer_b0 iformer_t cpubone_nano csatv2 efficientvim_m1 nextvit_small
    visformer_tiny lambda_resnet26t halonet26t botnet26t_256 sehalonet33ts coatnet_nano_rw_224
    maxvit_pico_rw_256 focalnet_tiny_srf
"""

# Networks with attention, alone or mixed with convolutions: channels that cannot be traced stay, the rest are pruned.
MIXED = """
    vit_b_16 swin_t swin_v2_t maxvit_t
    vit_tiny_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 pvt_v2_b0 twins_svt_small nest_tiny davit_tiny hiera_tiny_224
    mvitv2_tiny gcvit_xxtiny mobilevit_s coatnet_0_224 edgenext_small maxvit_tiny_tf_224 tiny_vit_5m_224 convit_tiny
    cait_xxs24_224 volo_d1_224 crossvit_tiny_240 xcit_nano_12_p16_224 tnt_s_legacy_patch16_224 pit_ti_224
    mixer_s32_224 gmixer_24_224 resmlp_12_224 sequencer2d_s
"""

# torchvision's segmentation networks, and the backbones of its detectors, which select no boxes.
SEGMENTERS = ["fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
BACKBONES = [
    *("ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "retinanet_resnet50_fpn"),
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"),
]
DETECTORS = [
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn"),
    *("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
    *("fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
]
BOXES = 8
"""Boxes of an image for the heads of an R-CNN."""

SIDES = {"inception_v3": 299, "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}


def names() -> list[str]:
    """List all networks: ``KIND:NAME``; the kinds are torchvision, timm, mixed, segmentation, backbone, detection."""
    import torchvision

    listed = torchvision.models.list_models(module=torchvision.models)
    return [
        *(f"torchvision:{name}" for name in listed if not name.startswith(TRANSFORMERS)),
        *(f"timm:{name}" for name in TIMM.split()),
        *(f"mixed:{name}" for name in MIXED.split()),
        *(f"segmentation:{name}" for name in SEGMENTERS),
        *(f"backbone:{name}" for name in BACKBONES),
        *(f"detection:{name}" for name in DETECTORS),
    ]


def create(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a network of the list with random weights in eval mode, and the size (C, H, W) of its images."""
    import torchvision

    kind, _, short = name.partition(":")
    side = SIDES.get(short, 224)
    size = (3, side, side)
    torch.manual_seed(0)
    if kind in ("segmentation", "backbone", "detection"):
        model: nn.Module = torchvision.models.get_model(short, weights=None, weights_backbone=None)
        if kind == "backbone":
            model = model.backbone  # type: ignore[assignment]
        elif kind == "detection":
            model = AtBoxes(model, side) if hasattr(model, "roi_heads") else DenseNetwork(model)
    else:
        if kind == "mixed":
            kind = "torchvision" if short in torchvision.models.list_models(module=torchvision.models) else "timm"
        model = models.create(f"{kind}:{short}")
        size = tuple(getattr(model, "default_cfg", {}).get("input_size", size))
    return randomise(model).eval(), size


class AtBoxes(nn.Module):
    """The network of an R-CNN, with its heads on boxes that are always the same.

    Args:
        detector: the R-CNN.
        side: height and width of the images.
    """

    def __init__(self, detector: nn.Module, side: int) -> None:
        super().__init__()
        self.network = RegionNetwork(detector)
        self.register_buffer("boxes", make_boxes(BOXES, side, side))

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Return the outputs of all heads for images [N, 3, H, W]."""
        outputs: dict[str, Any] = self.network(images, self.boxes.expand(len(images), -1, -1))
        return outputs


def randomise(model: nn.Module) -> nn.Module:
    """Randomise the statistics of batch norms, and parameters whose values are all equal.

    A new network scales branches by 0 and channels by 1, which would hide a wrong index.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.8, 1.2, generator=generator)
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator) + 0.05)
    return model

"""The architectures of the coverage benchmark, by name: torchvision, timm, transformers, and a few of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision_schemas  # noqa: F401
from coverage_own import Crnn, Recurrent, UNet, Yolo
from torch import nn

# isort: split
import timm
import torchvision.models as tv

torch.backends.mha.set_fastpath_enabled(False)  # a fused operator that no exporter knows

Make = Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]


class Logits(nn.Module):
    """The one tensor of a model that answers with a dictionary."""

    def __init__(self, inner: nn.Module, key: str, **options: object) -> None:
        super().__init__()
        self.inner, self.key, self.options = inner, key, options

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """One pass."""
        return self.inner(*inputs, **self.options)[self.key]


def _image(size: int, channels: int = 3) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


def _small_vgg() -> nn.Module:
    """VGG without its 400 MB of fully connected layers."""
    model = tv.vgg11_bn(weights=None)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return model


def _tv(name: str, size: int = 64, **options: object) -> Make:
    return lambda: (getattr(tv, name)(weights=None, **options), _image(size))


def _segmentation(name: str) -> Make:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        model = getattr(tv.segmentation, name)(weights=None, weights_backbone=None, num_classes=4)
        return Logits(model, "out"), _image(64)

    return make


class Detections(nn.Module):
    """A detector on one image, given as a batch of one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One pass."""
        found = self.inner([x[0]])
        return tuple((found[1] if isinstance(found, tuple) else found)[0].values())


def _detection(name: str, size: int) -> Make:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        few = {"detections_per_img": 20, "topk_candidates": 50, "score_thresh": 0.0}
        if "rcnn" in name:
            few = {"box_detections_per_img": 20, "box_score_thresh": 0.0, "rpn_pre_nms_top_n_test": 50}
            few |= {"rpn_post_nms_top_n_test": 30, "min_size": size, "max_size": size}
        elif "ssd" not in name:
            few |= {"min_size": size, "max_size": size}
        model = getattr(tv.detection, name)(weights=None, weights_backbone=None, num_classes=4, **few)
        return Detections(model), (torch.rand(1, 3, size, size),)

    return make


def _timm(name: str, size: int = 64, **options: object) -> Make:
    return lambda: (
        timm.create_model(name, pretrained=False, num_classes=10, **options),
        _image(int(str(options.get("img_size", size)))),
    )


def _transformer(kind: str) -> Make:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        import transformers as t

        tokens = torch.randint(0, 90, (2, 12))
        small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        if kind == "bert":
            config = t.BertConfig(vocab_size=100, **small, attn_implementation="eager")
            return Logits(t.BertModel(config), "last_hidden_state"), (tokens,)
        if kind == "distilbert":
            config = t.DistilBertConfig(
                vocab_size=100, dim=48, n_layers=2, n_heads=4, hidden_dim=96, attn_implementation="eager"
            )
            return Logits(t.DistilBertModel(config), "last_hidden_state"), (tokens,)
        if kind == "gpt2":
            config = t.GPT2Config(vocab_size=100, n_embd=48, n_layer=2, n_head=4, attn_implementation="eager")
            return Logits(t.GPT2LMHeadModel(config), "logits", use_cache=False), (tokens,)
        if kind == "llama":
            config = t.LlamaConfig(vocab_size=100, **small, num_key_value_heads=2, attn_implementation="eager")
            return Logits(t.LlamaForCausalLM(config), "logits", use_cache=False), (tokens,)
        if kind == "clip_text":
            config = t.CLIPTextConfig(vocab_size=100, **small, eos_token_id=2, attn_implementation="eager")
            return Logits(t.CLIPTextModel(config), "last_hidden_state"), (tokens,)
        config = t.ViTConfig(
            image_size=64,
            patch_size=16,
            **small | {"num_hidden_layers": 12, "intermediate_size": 192},
            attn_implementation="eager",
        )
        return Logits(t.ViTModel(config), "last_hidden_state"), _image(64)

    return make


def _recurrent(cell: type, both: bool) -> Make:
    return lambda: (Recurrent(cell, both), (torch.randn(2, 9, 10),))


TV = (
    "squeezenet1_1 resnet18 resnet50 resnext50_32x4d densenet121 mobilenet_v2 mobilenet_v3_small "
    "mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny "
    "swin_t swin_v2_t"
)
AUX = {"init_weights": False, "aux_logits": False}
SMALL_VIT = {"image_size": 64, "patch_size": 16, "num_layers": 4, "num_heads": 4, "hidden_dim": 96, "mlp_dim": 192}
SMALL_MAXVIT = {
    "stem_channels": 32,
    "block_channels": [32, 64],
    "block_layers": [1, 2],
    "head_dim": 16,
    "stochastic_depth_prob": 0.0,
}
MODELS: dict[str, Make] = {f"tv/{n}": _tv(n) for n in TV.split()}
MODELS |= {
    "tv/alexnet": _tv("alexnet", 224, num_classes=10),
    "tv/vgg11_bn": lambda: (_small_vgg(), _image(64)),
    "tv/inception_v3": _tv("inception_v3", 96, transform_input=True, **AUX),
    "tv/googlenet": _tv("googlenet", 64, **AUX),
    "tv/vit": lambda: (tv.VisionTransformer(**SMALL_VIT), _image(64)),
    "tv/maxvit": lambda: (tv.MaxVit((64, 64), **SMALL_MAXVIT, partition_size=4), _image(64)),
}
MODELS |= {
    f"seg/{n}": _segmentation(n)
    for n in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
}
MODELS |= {
    f"det/{n}": _detection(n, s)
    for n, s in (
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 128),
        ("fcos_resnet50_fpn", 128),
        ("keypointrcnn_resnet50_fpn", 128),
        ("maskrcnn_resnet50_fpn", 128),
        ("retinanet_resnet50_fpn", 128),
        ("ssd300_vgg16", 300),
        ("ssdlite320_mobilenet_v3_large", 320),
    )
}
# the smallest variant of each family of timm: as it is, those that have to be told the size, and larger inputs
TIMM = (
    "caformer_s18 convformer_s18 convmixer_768_32 convnext_atto convnextv2_atto cpubone_b0_bfrobust crossvit_9_240 "
    "cs3darknet_s csatv2 cspnext_tiny cspresnet50 darknet53 davit_tiny densenet121 dla34 eca_nfnet_l0 dpn68 "
    "eca_resnet33ts ecaresnet26t edgenext_xx_small efficientnet_lite0 efficientvim_m1 efficientvit_b0 "
    "efficientvit_m0 ese_vovnet19b_dw fasternet_t0 fastvit_t8 fbnetc_100 focalnet_tiny_srf gcresnet33ts gernet_s "
    "ghostnet_100 hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small iformer_t inception_next_tiny lcnet_050 "
    "lcnetv2_small legacy_seresnet18 legacy_xception lowformer_b0 mambaout_femto mixnet_s mobilenetv3_small_050 "
    "mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 nextvit_small nf_regnet_b0 poolformer_s12 "
    "pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9 "
    "res2net50_14w_8s resnest14d resnet10t resnetblur18 resnetv2_50 rexnet_100 selecsls42 semnasnet_075 seresnet18 "
    "shvit_s1 skresnet18 starnet_s1 swiftformer_xs tiny_vit_5m_224 tinynet_e tresnet_m vovnet39a "
    "wide_resnet50_2 xception41"
)
TIMM_SIZED = (
    "botnet26t_256 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convit_tiny deit_tiny_patch16_224 "
    "efficientformerv2_s0 gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224 levit_128s maxvit_nano_rw_256 mixer_s32_224 "
    "mvitv2_tiny nest_tiny pit_ti_224 resmlp_12_224 sequencer2d_s swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 "
    "swinv2_tiny_window8_256 tnt_s_patch16_224 twins_svt_small visformer_tiny vit_relpos_small_patch16_224 "
    "vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xcit_nano_12_p16_224"
)
TIMM_128 = "inception_resnet_v2 inception_v4"
TIMM_224 = "efficientformer_l1"
SHALLOW = {"img_size": 64, "embed_dim": 96, "depth": 8, "num_heads": 4}  # families that have large variants only
TIMM_SHALLOW = "beit_base_patch16_224 deit3_small_patch16_224 eva02_tiny_patch14_224 samvit_base_patch16"
MODELS |= {f"timm/{n}": _timm(n) for n in TIMM.split()}
MODELS |= {f"timm/{n}": _timm(n, img_size=64) for n in TIMM_SIZED.split()}
MODELS |= {f"timm/{n}": _timm(n, 128) for n in TIMM_128.split()}
MODELS |= {f"timm/{n}": _timm(n, 224) for n in TIMM_224.split()}
MODELS |= {f"timm/{n}": _timm(n, **SHALLOW) for n in TIMM_SHALLOW.split()}
MODELS |= {f"hf/{k}": _transformer(k) for k in ("bert", "distilbert", "gpt2", "llama", "clip_text", "vit")}
MODELS |= {
    "own/unet": lambda: (UNet(), _image(32)),
    "own/crnn_lstm": lambda: (Crnn(nn.LSTM), (torch.randn(2, 1, 32, 64),)),
    "own/crnn_gru": lambda: (Crnn(nn.GRU), (torch.randn(2, 1, 32, 64),)),
    "own/yolov5": lambda: (Yolo(5), _image(64)),
    "own/yolov8": lambda: (Yolo(8), _image(64)),
    "own/lstm": _recurrent(nn.LSTM, False),
    "own/bilstm": _recurrent(nn.LSTM, True),
    "own/bigru": _recurrent(nn.GRU, True),
    "own/rnn": _recurrent(nn.RNN, False),
}

"""Export architectures with random weights through PyTorch's two exporters, for `coverage.py`.

    python benchmarks/coverage_export.py FOLDER [--only REGEX] [--exporter torchscript|dynamo]

Needs torch, torchvision, timm, transformers and onnxscript; nothing else of the project does.
One file per (family, exporter, batch); a file that exists is kept.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

warnings.filterwarnings("ignore")

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width)"
    " -> (Tensor, Tensor)",
    "_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width) -> Tensor",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale,"
    " SymInt pooled_height, SymInt pooled_width, int sampling_ratio, SymInt batch_size, SymInt channels,"
    " SymInt height, SymInt width) -> Tensor",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width)"
    " -> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale,"
    " SymInt pooled_height, SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width)"
    " -> Tensor",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h,"
    " SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups,"
    " SymInt offset_groups, bool use_mask) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias,"
    " SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w,"
    " SymInt groups, SymInt offset_groups, bool use_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def _define_schemas() -> None:
    """Torchvision's compiled operators do not load beside every build of torch; their schemas are enough."""
    for schema in _SCHEMAS:
        try:
            _LIBRARY.define(schema)
        except RuntimeError:
            return


_define_schemas()
import timm  # noqa: E402
import torchvision.models as tv  # noqa: E402

Make = Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]


class Logits(nn.Module):
    """The one tensor of a model that answers with a dictionary."""

    def __init__(self, inner: nn.Module, key: str, **options: object) -> None:
        super().__init__()
        self.inner, self.key, self.options = inner, key, options

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """One pass."""
        return self.inner(*inputs, **self.options)[self.key]


class UNet(nn.Module):
    """A U-Net with transposed convolutions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())

        self.one, self.two, self.three = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.mix2, self.mix1, self.head = block(4 * width, 2 * width), block(2 * width, width), nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        a = self.one(x)
        b = self.two(nn.functional.max_pool2d(a, 2))
        c = self.three(nn.functional.max_pool2d(b, 2))
        b = self.mix2(torch.cat([self.up2(c), b], 1))
        return self.head(self.mix1(torch.cat([self.up1(b), a], 1)))


class Crnn(nn.Module):
    """Convolutions, then a recurrent network over the columns."""

    def __init__(self, cell: type = nn.LSTM) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d((8, 2)),
        )  # fmt: skip
        self.rnn = cell(64, 24, num_layers=2, bidirectional=True)
        self.head = nn.Linear(48, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        x = self.features(x)
        return self.head(self.rnn(x.flatten(1, 2).permute(2, 0, 1))[0])


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.SiLU())
        self.b = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        return x + self.b(self.a(x))


class C2f(nn.Module):
    """The split block of YOLOv8."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.one, self.inner = nn.Conv2d(a, b, 1), Bottleneck(b // 2)
        self.two = nn.Conv2d(b + b // 2, b, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        y = list(self.one(x).chunk(2, 1))
        y.append(self.inner(y[-1]))
        return self.two(torch.cat(y, 1))


class Yolo(nn.Module):
    """A small YOLO with a v5-like (anchors) or a v8-like (distribution focal) head."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.version, w = version, 16
        self.stem = nn.Sequential(nn.Conv2d(3, w, 6, 2, 2), nn.BatchNorm2d(w), nn.SiLU())
        self.down = nn.ModuleList([nn.Sequential(nn.Conv2d(w << k, w << k + 1, 3, 2, 1), nn.SiLU()) for k in range(3)])
        self.c2f = nn.ModuleList([C2f(w << k + 1, w << k + 1) for k in range(3)])
        self.lateral = nn.ModuleList([nn.Conv2d(8 * w + 4 * w, 4 * w, 1), nn.Conv2d(4 * w + 2 * w, 2 * w, 1)])
        self.classes = 5
        out = 3 * (self.classes + 5) if version == 5 else 64 + self.classes
        self.heads = nn.ModuleList([nn.Conv2d(2 * w << k, out, 1) for k in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        x = self.stem(x)
        found = []
        for down, c2f in zip(self.down, self.c2f, strict=True):
            x = c2f(down(x))
            found.append(x)
        p3, p4, p5 = found
        p4 = self.lateral[0](torch.cat([nn.functional.interpolate(p5, scale_factor=2), p4], 1))
        p3 = self.lateral[1](torch.cat([nn.functional.interpolate(p4, scale_factor=2), p3], 1))
        results = []
        for p, head in zip((p3, p4, p5), self.heads, strict=True):
            y = head(p)
            b, _, h, w = y.shape
            if self.version == 5:
                y = y.view(b, 3, self.classes + 5, h, w).permute(0, 1, 3, 4, 2).sigmoid()
                xy, wh, rest = y.split((2, 2, self.classes + 1), 4)
                results.append(torch.cat((xy * 2, (wh * 2) ** 2, rest), 4).reshape(b, -1, self.classes + 5))
            else:
                results.append(y.view(b, -1, h * w))
        if self.version == 5:
            return torch.cat(results, 1)
        y = torch.cat(results, 2)
        box, scores = y.split((64, self.classes), 1)
        b, _, a = box.shape
        box = box.view(b, 4, 16, a).transpose(2, 1).softmax(1)
        weights = torch.arange(16, dtype=torch.float).view(1, 16, 1, 1)
        return torch.cat(((box * weights).sum(1), scores.sigmoid()), 1)


def _image(size: int, channels: int = 3) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


def _tv(name: str, size: int = 64, **options: object) -> Make:
    return lambda: (getattr(tv, name)(weights=None, **options), _image(size))


def _segmentation(name: str) -> Make:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        model = getattr(tv.segmentation, name)(weights=None, weights_backbone=None, num_classes=4)
        return Logits(model, "out"), _image(64)

    return make


def _timm(name: str, size: int = 64, **options: object) -> Make:
    return lambda: (timm.create_model(name, pretrained=False, num_classes=10, **options), _image(size))


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
        config = t.ViTConfig(image_size=64, patch_size=16, **small, attn_implementation="eager")
        return Logits(t.ViTModel(config), "last_hidden_state"), _image(64)

    return make


class Recurrent(nn.Module):
    """A recurrent network and a layer on top."""

    def __init__(self, cell: type, both: bool) -> None:
        super().__init__()
        self.rnn = cell(10, 24, 2, batch_first=True, bidirectional=both)
        self.head = nn.Linear(48 if both else 24, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        return self.head(self.rnn(x)[0])


def _recurrent(cell: type, both: bool) -> Make:
    return lambda: (Recurrent(cell, both), (torch.randn(2, 9, 10),))


MODELS: dict[str, Make] = {
    f"tv/{n}": _tv(n, s, **o)
    for n, s, o in (
        ("alexnet", 96, {}),
        ("vgg11_bn", 64, {}),
        ("squeezenet1_1", 64, {}),
        ("resnet18", 64, {}),
        ("resnet50", 64, {}),
        ("resnext50_32x4d", 64, {}),
        ("wide_resnet50_2", 64, {}),
        ("densenet121", 64, {}),
        ("inception_v3", 128, {"init_weights": False, "aux_logits": False, "transform_input": True}),
        ("googlenet", 64, {"init_weights": False, "aux_logits": False}),
        ("mobilenet_v2", 64, {}),
        ("mobilenet_v3_small", 64, {}),
        ("mnasnet0_5", 64, {}),
        ("shufflenet_v2_x0_5", 64, {}),
        ("efficientnet_b0", 64, {}),
        ("efficientnet_v2_s", 64, {}),
        ("regnet_x_400mf", 64, {}),
        ("regnet_y_400mf", 64, {}),
        ("convnext_tiny", 64, {}),
        ("vit_b_16", 224, {}),
        ("swin_t", 64, {}),
        ("swin_v2_t", 64, {}),
        ("maxvit_t", 224, {}),
    )
}
MODELS |= {
    f"seg/{n}": _segmentation(n)
    for n in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
}
MODELS |= {
    f"timm/{n}": _timm(n, s, **o)
    for n, s, o in (
        ("botnet26t_256", 256, {}),
        ("cait_xxs24_224", 224, {}),
        ("coat_tiny", 224, {}),
        ("coatnet_nano_rw_224", 224, {}),
        ("convit_tiny", 224, {}),
        ("convmixer_768_32", 64, {}),
        ("convnextv2_atto", 64, {}),
        ("crossvit_9_240", 240, {}),
        ("cs3darknet_s", 64, {}),
        ("cspresnet50", 64, {}),
        ("darknet53", 64, {}),
        ("davit_tiny", 64, {}),
        ("deit_tiny_patch16_224", 224, {}),
        ("densenet121", 64, {}),
        ("dla34", 64, {}),
        ("dm_nfnet_f0", 64, {}),
        ("dpn68", 64, {}),
        ("eca_resnet33ts", 64, {}),
        ("edgenext_xx_small", 64, {}),
        ("efficientformer_l1", 224, {}),
        ("efficientformerv2_s0", 224, {}),
        ("efficientnet_lite0", 64, {}),
        ("efficientvit_b0", 64, {}),
        ("ese_vovnet19b_dw", 64, {}),
        ("fastvit_t8", 64, {}),
        ("fbnetc_100", 64, {}),
        ("focalnet_tiny_srf", 64, {}),
        ("gcresnet33ts", 64, {}),
        ("gernet_s", 64, {}),
        ("ghostnet_100", 64, {}),
        ("gmlp_ti16_224", 224, {}),
        ("hardcorenas_a", 64, {}),
        ("hgnet_tiny", 64, {}),
        ("hgnetv2_b0", 64, {}),
        ("hiera_tiny_224", 224, {}),
        ("hrnet_w18_small", 64, {}),
        ("inception_resnet_v2", 128, {}),
        ("inception_v4", 128, {}),
        ("inception_next_tiny", 64, {}),
        ("lcnet_050", 64, {}),
        ("levit_128s", 224, {}),
        ("mambaout_femto", 64, {}),
        ("maxvit_nano_rw_256", 256, {}),
        ("mixer_s32_224", 224, {}),
        ("mixnet_s", 64, {}),
        ("mobileone_s0", 64, {}),
        ("mobilenetv4_conv_small", 64, {}),
        ("mobilevit_xxs", 64, {}),
        ("mobilevitv2_050", 64, {}),
        ("mvitv2_tiny", 224, {}),
        ("nest_tiny", 224, {}),
        ("nextvit_small", 64, {}),
        ("nf_regnet_b0", 64, {}),
        ("pit_ti_224", 224, {}),
        ("poolformer_s12", 64, {}),
        ("pvt_v2_b0", 64, {}),
        ("rdnet_tiny", 64, {}),
        ("regnetz_b16", 64, {}),
        ("repghostnet_050", 64, {}),
        ("repvgg_a0", 64, {}),
        ("repvit_m0_9", 64, {}),
        ("res2net50_14w_8s", 64, {}),
        ("resmlp_12_224", 224, {}),
        ("resnest14d", 64, {}),
        ("resnetblur18", 64, {}),
        ("resnetv2_50", 64, {}),
        ("rexnet_100", 64, {}),
        ("selecsls42", 64, {}),
        ("semnasnet_075", 64, {}),
        ("sequencer2d_s", 224, {}),
        ("seresnet18", 64, {}),
        ("skresnet18", 64, {}),
        ("starnet_s1", 64, {}),
        ("swin_tiny_patch4_window7_224", 224, {}),
        ("swinv2_tiny_window8_256", 256, {}),
        ("tiny_vit_5m_224", 224, {}),
        ("tinynet_e", 64, {}),
        ("tresnet_m", 64, {}),
        ("twins_svt_small", 224, {}),
        ("vgg11", 64, {}),
        ("visformer_tiny", 224, {}),
        ("vit_tiny_patch16_224", 224, {}),
        ("volo_d1_224", 224, {}),
        ("vovnet39a", 64, {}),
        ("wide_resnet50_2", 64, {}),
        ("xception41", 64, {}),
        ("xcit_nano_12_p16_224", 224, {}),
    )
}
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


def export(name: str, exporter: str, dynamic: bool, path: Path) -> None:
    """Write one model."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    names = [f"input{k}" for k in range(len(inputs))]
    options: dict[str, object] = {"input_names": names, "output_names": ["output"]}
    if exporter == "torchscript":
        if dynamic:
            options["dynamic_axes"] = {n: {0: "batch"} for n in (*names, "output")}
        torch.onnx.export(model, inputs, str(path), dynamo=False, opset_version=17, **options)
        return
    if dynamic:
        batch = torch.export.Dim("batch", min=1, max=64)
        options["dynamic_shapes"] = (
            (tuple({0: batch} for _ in inputs),) if isinstance(model, Logits) else tuple({0: batch} for _ in inputs)
        )
    torch.onnx.export(model, inputs, str(path), dynamo=True, external_data=False, verbose=False, **options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--exporter", choices=["torchscript", "dynamo"])
    parser.add_argument("--batch", choices=["fixed", "dynamic"])
    parser.add_argument("--largest", type=float, default=130.0, help="MB; larger files are not kept")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in (n for n in MODELS if re.search(options.only, n)):
        for exporter in ("torchscript", "dynamo"):
            for batch in ("fixed", "dynamic"):
                path = options.folder / f"{name.replace('/', '__')}__{exporter}__{batch}.onnx"
                if path.exists() or path.with_suffix(".failed").exists():
                    continue
                if (options.exporter or exporter) != exporter or (options.batch or batch) != batch:
                    continue
                start = time.time()
                part = path.with_suffix(".part")
                try:
                    with torch.no_grad():
                        export(name, exporter, batch == "dynamic", part)
                    if part.stat().st_size > options.largest * 1e6:
                        raise ValueError(f"{part.stat().st_size / 1e6:.0f} MB")
                    part.rename(path)
                    said = "ok"
                except Exception as error:  # an architecture that an exporter refuses is not ours to judge
                    part.unlink(missing_ok=True)
                    said = repr(error).splitlines()[0][:200]
                    path.with_suffix(".failed").write_text(said)
                print(f"{path.stem}: {said} ({time.time() - start:.0f} s)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

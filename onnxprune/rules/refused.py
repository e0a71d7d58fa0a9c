"""Operators that are left alone, each with a reason that a person can act on."""

from __future__ import annotations

from onnxprune.axes import Refusal
from onnxprune.rules.base import BODY, Row, Table, add

REASONS = {
    "ConvInteger MatMulInteger QLinearConv QLinearMatMul DynamicQuantizeLinear": (
        "works on integers; prune the float or the QDQ model, and quantise afterwards"
    ),
    "SequenceMap": BODY,
    "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike": (
        "draws random numbers, so that no cut can be proven"
    ),
    "MaxUnpool": "reads flat indices, which count the channels",
    "NonMaxSuppression NonZero Unique": "gives as many elements as the values say",
    "ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt SequenceConstruct SequenceEmpty "
    "SequenceErase SequenceInsert SequenceLength SplitToSequence": (
        "works on a sequence of tensors, which is not followed; split and concatenate tensors instead"
    ),
    "ImageDecoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer": "works on text or files",
    "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss": "is a loss, which belongs to training; export for inference",
    "BlackmanWindow DFT HammingWindow HannWindow MelWeightMatrix STFT": (
        "belongs to a signal transform, whose axes hold frequencies and times, not channels"
    ),
    "BitCast": "reads the bits of a value as another type",
    "CenterCropPad": "crops to sizes that it is given",
    "EyeLike": "makes an identity matrix of its input's size",
    "LinearAttention CausalConvWithState TensorScatter": "carries a state from call to call",
    "SwiGLU": "splits its axis in ways that no rule tells yet",
    "AffineGrid": "makes a grid of coordinates, which holds no channels",
    "Range": "counts up to a number, which is not a size of channels",
}

REASONS_OF_MICROSOFT = {
    "DynamicQuantizeLSTM DynamicQuantizeMatMul MatMulIntegerToFloat MatMulBnb4 MatMulNBits QAttention QGemm "
    "QLinearAdd QLinearAveragePool QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul "
    "QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QMoE QOrderedMatMul": (
        "works on integers; prune the float or the QDQ model, and quantise afterwards"
    ),
    "DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention GroupQueryAttention PackedAttention "
    "PackedMultiHeadAttention PagedAttention SparseAttention RelativePositionBias GatedRelativePositionBias "
    "LongformerAttention": ("is an attention operator made by an optimizer; prune the model before it is optimised"),
    "EmbedLayerNormalization": "normalises the hidden axis of the embedding; prune the model before it is optimised",
    "BeamSearch GreedySearch Sampling WhisperBeamSearch": "holds a whole model inside; prune that model before",
    "BiasAdd BiasSplitGelu BiasSoftmax BiasDropout ConvTransposeWithDynamicPads CropAndResize "
    "GroupNorm MoE NhwcConv NhwcFusedConv NhwcMaxPool SkipGroupNorm": (
        "is made by an optimizer for one device; prune the model before it is optimised"
    ),
}


REASONS_OF_LAYOUT = {
    "AveragePool Conv GlobalAveragePool GlobalMaxPool MaxPool ReorderInput ReorderOutput Upsample": (
        "is laid out for one machine by onnxruntime's optimizer; prune the model that it was made from"
    ),
}


def register(table: Table) -> None:
    """Add the rows of this file."""
    for domain, reasons in (
        ("", REASONS),
        ("com.microsoft", REASONS_OF_MICROSOFT),
        ("com.microsoft.nchwc", REASONS_OF_LAYOUT),
    ):
        for names, reason in reasons.items():
            for name in names.split():
                add(table, name, Row(Refusal(f"{name} {reason}")), domain=domain)

"""Which class of timm is replaced by what, and which is left alone for what reason."""

from __future__ import annotations

from vitkernels.integrations.swap import Fused, Swaps
from vitkernels.integrations.timm import (
    bias,
    channels,
    cross,
    decomposed,
    feature_map,
    partitions,
    rope,
    self_attention,
    windows,
)

__all__ = ["FUSED", "LEFT", "SWAPS"]

#: Name of the accelerated class -> timm's class, and the forward that goes before it.
FUSED: dict[str, tuple[str, type[Fused]]] = {
    "FusedAttention": ("timm.layers.attention.Attention", self_attention.SelfAttention),
    "FusedAttention2d": ("timm.layers.attention2d.Attention2d", feature_map.MapAttention),
    "FusedAttentionPool2d": ("timm.layers.attention_pool2d.AttentionPool2d", cross.PositionalPooling),
    "FusedAttentionPoolLatent": ("timm.layers.attention_pool.AttentionPoolLatent", cross.LatentPooling),
    "FusedAttentionPoolPrr": ("timm.layers.attention_pool.AttentionPoolPrr", cross.ParameterFreePooling),
    "FusedAttentionRope": ("timm.layers.attention.AttentionRope", rope.RotaryAttention),
    "FusedBeitAttention": ("timm.models.beit.Attention", bias.BeitAttention),
    "FusedClassAttn": ("timm.models.cait.ClassAttn", cross.ClassAttention),
    "FusedCoAtNetAttention2d": ("timm.models.maxxvit.Attention2d", feature_map.BiasedMapAttention),
    "FusedConViTAttention": ("timm.models.convit.MHSA", self_attention.PackedAttention),
    "FusedCPUBoneConvAttention": ("timm.models.cpubone.ConvAttention", feature_map.StridedMapAttention),
    "FusedCrossAttention": ("timm.models.crossvit.CrossAttention", cross.CrossAttention),
    "FusedDaVitChannelAttention": ("timm.models.davit.ChannelAttention", channels.ChannelGroups),
    "FusedDaVitChannelAttentionV2": ("timm.models.davit.ChannelAttentionV2", channels.ScaledChannelGroups),
    "FusedDaVitSpatialBlock": ("timm.models.davit.SpatialBlock", partitions.SpatialBlock),
    "FusedDiffAttention": ("timm.layers.diff_attention.DiffAttention", self_attention.DifferentialAttention),
    "FusedDiffParallelScalingBlock": (
        "timm.models.vision_transformer.DiffParallelScalingBlock", self_attention.DifferentialBlock,
    ),
    "FusedEdgeNeXtCrossCovarianceAttn": ("timm.models.edgenext.CrossCovarianceAttn", channels.CrossCovariance),
    "FusedEfficientFormerAttention": ("timm.models.efficientformer.Attention", bias.TableAttention),
    "FusedEfficientFormerAttention2dDownsample": (
        "timm.models.efficientformer_v2.Attention2dDownsample", bias.DownsamplingMapAttention,
    ),
    "FusedEvaAttention": ("timm.models.eva.EvaAttention", rope.RotaryAttention),
    "FusedFastVitAttention": ("timm.models.fastvit.Attention", feature_map.LinearMapAttention),
    "FusedGatedPositionalAttention": ("timm.models.convit.GPSA", bias.GatedPositionalAttention),
    "FusedGemma4Attention": ("timm.models.gemma4_vit.Gemma4Attention", rope.GemmaAttention),
    "FusedGlobalSubSampleAttn": ("timm.models.twins.GlobalSubSampleAttn", cross.SubsampledKeysAttention),
    "FusedHieraAttention": ("timm.models.hiera.MaskUnitAttention", self_attention.MaskUnitAttention),
    "FusedHieraDetAttention": ("timm.models.hieradet_sam2.MultiScaleAttention", self_attention.PoolingStageAttention),
    "FusedIFormerAttention": ("timm.models.iformer.SHMA", feature_map.ModulatedAttention),
    "FusedLevitAttention": ("timm.models.levit.Attention", bias.TableAttention),
    "FusedLevitAttentionDownsample": ("timm.models.levit.AttentionDownsample", bias.DownsamplingAttention),
    "FusedLocallyGroupedAttn": ("timm.models.twins.LocallyGroupedAttn", partitions.LocallyGroupedAttention),
    "FusedLowFormerConvAttention": ("timm.models.lowformer.ConvAttention", feature_map.StridedMapAttention),
    "FusedMetaFormerAttention": ("timm.models.metaformer.Attention", self_attention.PackedAttention),
    "FusedMultiQueryAttention2d": ("timm.layers.attention2d.MultiQueryAttention2d", feature_map.MultiQueryAttention),
    "FusedMultiScaleAttention": ("timm.models.mvitv2.MultiScaleAttention", decomposed.PooledAttention),
    "FusedNextVitAttention": ("timm.models.nextvit.EfficientAttention", cross.ReducedKeysAttention),
    "FusedParallelScalingBlock": ("timm.models.vision_transformer.ParallelScalingBlock", self_attention.ParallelBlock),
    "FusedPartitionAttentionCl": ("timm.models.maxxvit.PartitionAttentionCl", partitions.PartitionBlock),
    "FusedPvtAttention": ("timm.models.pvt_v2.Attention", cross.PooledKeysAttention),
    "FusedRelPosAttention": ("timm.models.vision_transformer_relpos.RelPosAttention", bias.RelativePositionAttention),
    "FusedRotAttentionPool2d": ("timm.layers.attention_pool2d.RotAttentionPool2d", cross.RotaryPooling),
    "FusedSamAttention": ("timm.models.vision_transformer_sam.Attention", decomposed.WindowOrGlobalAttention),
    "FusedSimPool1d": ("timm.layers.other_pool.SimPool1d", cross.SimplePooling),
    "FusedSimPool2d": ("timm.layers.other_pool.SimPool2d", cross.SimplePooling),
    "FusedSwinTransformerBlock": ("timm.models.swin_transformer.SwinTransformerBlock", windows.WindowBlock),
    "FusedSwinTransformerV2Block": (
        "timm.models.swin_transformer_v2.SwinTransformerV2Block", windows.CosineWindowBlock,
    ),
    "FusedTinyVitBlock": ("timm.models.tiny_vit.TinyVitBlock", partitions.NormedWindowBlock),
    "FusedTntAttention": ("timm.models.tnt.Attention", self_attention.UnequalDimsAttention),
    "FusedVisformerAttention": ("timm.models.visformer.Attention", feature_map.PackedMapAttention),
    "FusedVoloAttention": ("timm.models.volo.Attention", self_attention.PackedAttention),
    "FusedVoloClassAttention": ("timm.models.volo.ClassAttention", cross.PackedClassAttention),
    "FusedXCA": ("timm.models.xcit.XCA", channels.CrossCovariance),
}  # fmt: skip

_WINDOWS = "windows are not fused yet"
_PART = "only fused with the block of timm around it"
_TALKING_HEADS = "the heads exchange logits and weights"
_QUERY_POSITIONS = "relative positions that depend on the query are not fused yet"
_FEW_TOKENS = "one head at a time over a few dozen tokens, where the kernel gains nothing"
_CHANNELS_FIRST = "channels come first: rearranging them costs what the kernel of linear attention gains"
_NOT_SOFTMAX = "not softmax attention between tokens"

#: timm's class -> why it is left alone.
LEFT = {
    "timm.layers.bottleneck_attn.BottleneckAttn": _QUERY_POSITIONS,
    "timm.layers.halo_attn.HaloAttn": _QUERY_POSITIONS,
    "timm.models.cait.TalkingHeadAttn": _TALKING_HEADS,
    "timm.models.coat.FactorAttnConvRelPosEnc": _NOT_SOFTMAX,
    "timm.models.davit.WindowAttention": _PART,
    "timm.models.efficientformer_v2.Attention2d": _TALKING_HEADS,
    "timm.models.efficientvit_mit.LiteMLA": _CHANNELS_FIRST,
    "timm.models.efficientvit_msra.CascadedGroupAttention": _FEW_TOKENS,
    "timm.models.gcvit.WindowAttentionGlobal": _WINDOWS,
    "timm.models.maxxvit.AttentionCl": _PART,
    "timm.models.mobilevit.LinearSelfAttention": _NOT_SOFTMAX,
    "timm.models.mvitv2.MultiScaleAttentionPoolFirst": _QUERY_POSITIONS,
    "timm.models.nest.Attention": _WINDOWS,
    "timm.models.nextvit.ConvAttention": _NOT_SOFTMAX,
    "timm.models.shvit.SHSA": _FEW_TOKENS,
    "timm.models.swiftformer.EfficientAdditiveAttention": _NOT_SOFTMAX,
    "timm.models.swin_transformer.WindowAttention": _PART,
    "timm.models.swin_transformer_v2.WindowAttention": _PART,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": _WINDOWS,
    "timm.models.tiny_vit.Attention": _PART,
    "timm.models.volo.OutlookAttention": _NOT_SOFTMAX,
}

SWAPS = Swaps(__name__, FUSED, LEFT)
__getattr__ = SWAPS.getattr

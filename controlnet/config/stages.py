"""The classes that `_target_` may name, with the names that other systems have for them, and their arguments."""

from typing import Any

from controlnet.config.schema import Key, flag, integer, mapping, number, only, several, silent, text

UNET = "controlnet.model.unet.UNet"
CONTROLNET = "controlnet.model.controlnet.ControlNet"
CONTROLLED = "controlnet.model.controlled.ControlledUNet"
AUTOENCODER = "controlnet.conditioning.AutoencoderKL"
SPACE_TO_DEPTH = "controlnet.conditioning.SpaceToDepth"
CLIP = "controlnet.conditioning.CLIPTextEncoder"
WORDS = "controlnet.conditioning.WordEmbedder"
TWO_CLIPS = "controlnet.conditioning.TextEncoders"

STAGES: dict[str, tuple[str, ...]] = {
    "unet_config": (UNET,),
    "control_stage_config": (CONTROLNET,),
    "first_stage_config": (AUTOENCODER, SPACE_TO_DEPTH),
    "cond_stage_config": (CLIP, WORDS, TWO_CLIPS),
}

_WIDTH = 65536  # more channels than any layer has; refused before anything is built
_count = integer(..., "", low=1, high=_WIDTH)

_NETWORK: dict[str, Key] = {
    "in_channels": integer(..., "channels of the latent", low=1, high=_WIDTH),
    "model_channels": integer(..., "channels of the first level, a multiple of 32", low=32, high=16384),
    "num_res_blocks": Key(
        (int, list),
        ...,
        "residual blocks of a level, or one number each",
        low=1,
        high=8,
        longest=8,
        items=integer(..., "", low=1, high=8),
    ),
    "attention_resolutions": several(..., "downsampling factors of the levels with attention", _count, longest=8),
    "channel_mult": several(
        [1, 2, 4, 8], "channels of each level, in units of model_channels", integer(..., "", low=1, high=64), longest=8
    ),
    "num_heads": integer(-1, "attention heads, without num_head_channels", low=-1, high=_WIDTH),
    "num_head_channels": integer(-1, "channels of a head", low=-1, high=_WIDTH),
    "num_heads_upsample": integer(-1, "heads in the decoder", low=-1, high=_WIDTH),
    "legacy": flag(True, "as in the original: num_heads_upsample is read"),
    "use_spatial_transformer": flag(False, "attention is a transformer that reads the text"),
    "transformer_depth": Key(
        (int, list),
        1,
        "blocks of a transformer, or one number for each level",
        low=1,
        high=16,
        longest=8,
        items=integer(..., "", low=0, high=16),
    ),
    "context_dim": Key((int, list), None, "features of the text", True, low=1, high=_WIDTH, items=_count),
    "use_linear_in_transformer": flag(False, "proj_in and proj_out are linear layers (Stable Diffusion 2)"),
    "disable_self_attentions": several(
        None, "for each level, whether its self-attention reads the text", flag(..., "")
    ),
    "disable_middle_self_attn": flag(False, "the same of the middle block"),
    "num_attention_blocks": several(None, "blocks of each level with attention", integer(..., "", low=0, high=64)),
    "use_new_attention_order": flag(False, "order of the qkv channels without spatial transformer"),
    "use_scale_shift_norm": flag(False, "the timestep scales and shifts a norm"),
    "resblock_updown": flag(False, "residual blocks change the resolution"),
    "conv_resample": flag(True, "convolutions change the resolution"),
    "dropout": number(0.0, "probability, in residual blocks", low=0, below=1),
    "use_checkpoint": flag(False, "recompute activations in backward: less memory, more time"),
    "use_flash_attention": flag(True, "fused attention; false keeps the score matrix in memory"),
    "dims": only(2, "pictures have two dimensions"),
    "num_classes": text(
        None, "sequential: a vector y joins the timestep (Stable Diffusion XL)", choices=("sequential",)
    ),
    "n_embed": only(None, "there is no codebook"),
    "adm_in_channels": integer(None, "channels of y, with num_classes", low=1, high=_WIDTH),
    "resblock_gn_groups": only(None, "group norm has 32 groups", 32),
    "transformer_depth_middle": integer(None, "of the middle block (default that of the last level)", low=1, high=16),
    "lora_network_alpha": only(None, "training only a low rank is not served"),
    "use_te_fp8": only(False, "Transformer Engine is not used"),
    "from_NeMo": flag(None, "a remark, with a warning where the names in the file say otherwise", null=True),
    "image_size": silent(None, "the network takes any size"),
    "use_fp16": silent(None, "trainer.precision decides"),
    "unet_precision": Key((int, str), None, "must be trainer.precision, or fp32", True),
    "use_te_dpa": silent(None, "attention is fused either way"),
    "timesteps": silent(None, "timestep embeddings are computed, not tabulated"),
    "offload_to_cpu": only(None, "activations stay on their device; use_checkpoint saves memory", False),
    "spatial_transformer_attn_type": only(None, "attention is softmax attention", "softmax", "softmax-xformers"),
    "use_fairscale_checkpoint": only(None, "use_checkpoint recomputes activations", False),
    "from_pretrained": text(None, "file or folder of the weights"),
}

_DDCONFIG = {
    "ch": integer(128, "channels of the first level", low=1, high=16384),
    "ch_mult": several(
        [1, 2, 4, 4], "channels of each level, in units of ch", integer(..., "", low=1, high=64), longest=8
    ),
    "num_res_blocks": integer(2, "residual blocks of a level", low=1, high=8),
    "z_channels": integer(None, "embed_dim", low=1, high=_WIDTH),
    "in_channels": integer(3, "of an image", low=1, high=_WIDTH),
    "out_ch": integer(3, "of an image", low=1, high=_WIDTH),
    "attn_resolutions": only([], "attention is in the middle block alone", None),
    "resolution": silent(None, "any size works"),
    "double_z": silent(None, "the encoder always gives mean and variance"),
    "dropout": silent(None, "the first stage is not trained"),
}
_NOT_TRAINED = {
    name: silent(None, "the first stage is not trained")
    for name in ("monitor", "lossconfig", "image_key", "colorize_nlabels")
}
_FROZEN = {
    "device": silent(None, "the condition stage lives where the model lives"),
    "freeze": only(None, "the condition stage is always frozen", True),
    "arch": silent(None, "the folder's own configuration decides"),
}
_precision = Key((int, str), None, "fp32, fp16 or bf16 (default trainer.precision)", True)

ARGUMENTS: dict[str, dict[str, Key]] = {
    UNET: {
        **_NETWORK,
        "out_channels": integer(..., "channels of the prediction", low=1, high=_WIDTH),
    },
    CONTROLNET: {
        **_NETWORK,
        "hint_channels": integer(..., "channels of the hint", low=1, high=_WIDTH),
        "hint_block_channels": several(
            [16, 32, 96, 256],
            "channels of the hint encoder's stages; each but the first halves the size",
            _count,
            longest=12,
        ),
        "from_pretrained_unet": text(None, "file of a U-Net whose encoder and middle block are the first weights"),
    },
    AUTOENCODER: {
        "from_pretrained": text(None, "file or folder of the weights"),
        "ddconfig": mapping("architecture, by the original's names; a folder has its own", _DDCONFIG),
        "embed_dim": integer(4, "channels of the latent", low=1, high=_WIDTH),
        "precision": _precision,
        **_NOT_TRAINED,
    },
    SPACE_TO_DEPTH: {
        "factor": integer(..., "side of the square that becomes channels", low=1, high=64),
        **_NOT_TRAINED,
    },
    CLIP: {
        "version": text("openai/clip-vit-large-patch14", "folder, or name in the local cache of transformers"),
        "max_length": integer(77, "tokens of the context", low=1, high=4096),
        "layer": text("last", "which hidden state", choices=("last", "penultimate", "hidden")),
        "layer_idx": integer(None, "which one, with layer hidden", low=-1024, high=1024),
        "from_pretrained": text(None, "checkpoint whose text encoder replaces the folder's weights"),
        "precision": _precision,
        **_FROZEN,
    },
    TWO_CLIPS: {
        "version": text(
            "openai/clip-vit-large-patch14", "a pipeline's folder, or the first encoder, as of CLIPTextEncoder"
        ),
        "version_2": text(None, "the second encoder (default the pipeline's, or OpenCLIP's ViT-bigG in the cache)"),
        "max_length": integer(77, "tokens of the context", low=1, high=4096),
        "from_pretrained": text(None, "checkpoint whose text encoders replace the folders' weights"),
        "zeros_for_empty": flag(True, "the empty caption is zeros, as SDXL base was trained; false encodes it"),
        "precision": _precision,
        **_FROZEN,
    },
    WORDS: {
        "vocabulary": several(..., "the words", text(..., "")),
        "dim": integer(..., "features of the context", low=1, high=16384),
        "max_length": integer(..., "words of the context", low=1, high=4096),
        "from_pretrained": text(None, "checkpoint with the tables"),
        "precision": _precision,
        **_FROZEN,
    },
}

# Keys of the parts that `build` reads; the class does not see them.
WEIGHT_KEYS: dict[str, tuple[str, ...]] = {
    UNET: ("from_pretrained", "from_NeMo"),
    CONTROLNET: ("from_pretrained_unet", "from_pretrained", "from_NeMo"),
}

_NEMO = "nemo.collections.multimodal.models."
_NEMO_SD = "nemo.collections.multimodal.modules.stable_diffusion."

# Names of the classes elsewhere.
TARGETS: dict[str, str] = {
    "cldm.cldm.ControlLDM": CONTROLLED,
    "cldm.cldm.ControlledUnetModel": UNET,
    "cldm.cldm.ControlNet": CONTROLNET,
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": UNET,
    "ldm.models.autoencoder.AutoencoderKL": AUTOENCODER,
    "sgm.modules.diffusionmodules.openaimodel.UNetModel": UNET,
    "sgm.models.autoencoder.AutoencoderKL": AUTOENCODER,
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": CLIP,
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": CLIP,
    _NEMO_SD + "diffusionmodules.openaimodel.UNetModel": UNET,
    _NEMO_SD + "encoders.modules.FrozenCLIPEmbedder": CLIP,
    _NEMO_SD + "encoders.modules.FrozenOpenCLIPEmbedder": CLIP,
    "diffusers.AutoencoderKL": AUTOENCODER,
    "transformers.CLIPTextModel": CLIP,
    # this package's own names before its modules moved into folders
    "controlnet.unet.UNet": UNET,
    "controlnet.controlnet.ControlNet": CONTROLNET,
    "controlnet.diffusion.ControlledUNet": CONTROLLED,
    "controlnet.sdxl.TextEncoders": TWO_CLIPS,
}
for _package in (_NEMO, _NEMO + "text_to_image."):
    TARGETS[_package + "controlnet.controlnet.ControlLDM"] = CONTROLLED
    TARGETS[_package + "controlnet.controlnet.MegatronControlNet"] = CONTROLLED
    TARGETS[_package + "controlnet.controlnet.ControlledUnetModel"] = UNET
    TARGETS[_package + "controlnet.controlnet.ControlNet"] = CONTROLNET
    TARGETS[_package + "stable_diffusion.ldm.autoencoder.AutoencoderKL"] = AUTOENCODER

# Arguments that a target's own defaults give a meaning that ours would not.
TARGET_DEFAULTS: dict[str, dict[str, Any]] = {
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": {"layer": "penultimate"},
    _NEMO_SD + "encoders.modules.FrozenOpenCLIPEmbedder": {"layer": "penultimate"},
}

_SERVED = (
    "Stable Diffusion XL is configured with the same parts as 1.x and 2.x; controlnet/configs/sdxl_seg.yaml has them,"
    f" with {TWO_CLIPS} for both text encoders"
)
# What is known and cannot be built, by the beginning of its name, with the reason.
REFUSED: dict[str, str] = {
    "sgm.": _SERVED,
    "diffusers.StableDiffusionXL": _SERVED,
    _NEMO + "text_to_image.stable_diffusion.diffusion_engine.": _SERVED,
    _NEMO + "stable_diffusion.diffusion_engine.": _SERVED,
    _NEMO_SD + "encoders.modules.GeneralConditioner": _SERVED,
    _NEMO_SD + "encoders.modules.FrozenMegatronCLIPEmbedder": (
        "its weights exist only as Megatron checkpoints; use a transformers folder of the same CLIP text encoder"
    ),
}

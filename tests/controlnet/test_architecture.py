"""Hyperparameters: the keys of SD 1.5's checkpoints, and an error for every invalid value."""

import inspect

import pytest
import torch

from controlnet.model.architecture import ONLY_VALUES, Architecture
from controlnet.model.controlnet import ControlNet
from controlnet.model.transformer import CrossAttention
from controlnet.model.unet import UNet
from tests.controlnet.twins import BASE

SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 768,
    "use_checkpoint": False,
    "legacy": False,
}
Shapes = dict[str, list[int]]


def weight_and_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": list(shape), f"{name}.bias": [shape[0]]}


def res(name: str, channels: int, out: int) -> Shapes:
    shapes = (
        weight_and_bias(f"{name}.in_layers.0", channels)
        | weight_and_bias(f"{name}.in_layers.2", out, channels, 3, 3)
        | weight_and_bias(f"{name}.emb_layers.1", out, 1280)
        | weight_and_bias(f"{name}.out_layers.0", out)
        | weight_and_bias(f"{name}.out_layers.3", out, out, 3, 3)
    )
    return shapes if channels == out else shapes | weight_and_bias(f"{name}.skip_connection", out, channels, 1, 1)


def transformer(name: str, c: int) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    shapes = weight_and_bias(f"{name}.norm", c)
    for proj in ("proj_in", "proj_out"):
        shapes |= weight_and_bias(f"{name}.{proj}", c, c, 1, 1)
    for attn, features in (("attn1", c), ("attn2", 768)):
        shapes |= {f"{block}.{attn}.to_q.weight": [c, c]}
        shapes |= {f"{block}.{attn}.to_{kind}.weight": [c, features] for kind in "kv"}
        shapes |= weight_and_bias(f"{block}.{attn}.to_out.0", c, c)
    shapes |= weight_and_bias(f"{block}.ff.net.0.proj", 8 * c, c) | weight_and_bias(f"{block}.ff.net.2", c, 4 * c)
    for norm in ("norm1", "norm2", "norm3"):
        shapes |= weight_and_bias(f"{block}.{norm}", c)
    return shapes


def trunk() -> Shapes:
    shapes = weight_and_bias("time_embed.0", 1280, 320) | weight_and_bias("time_embed.2", 1280, 1280)
    shapes |= weight_and_bias("input_blocks.0.0", 320, 4, 3, 3)
    channels = 320
    for first, out, attends in ((1, 320, True), (4, 640, True), (7, 1280, True), (10, 1280, False)):
        for block in (first, first + 1):
            shapes |= res(f"input_blocks.{block}.0", channels, out)
            if attends:
                shapes |= transformer(f"input_blocks.{block}.1", out)
            channels = out
        if first < 10:
            shapes |= weight_and_bias(f"input_blocks.{first + 2}.0.op", out, out, 3, 3)
    for block in (0, 2):
        shapes |= res(f"middle_block.{block}", 1280, 1280)
    return shapes | transformer("middle_block.1", 1280)


def sd15_unet() -> Shapes:
    shapes = trunk()
    outputs = [(2560, 1280), (2560, 1280), (2560, 1280), (2560, 1280), (2560, 1280), (1920, 1280),
               (1920, 640), (1280, 640), (960, 640), (960, 320), (640, 320), (640, 320)]  # fmt: skip
    for block, (channels, out) in enumerate(outputs):
        shapes |= res(f"output_blocks.{block}.0", channels, out)
        if block >= 3:
            shapes |= transformer(f"output_blocks.{block}.1", out)
    for name, c in (("2.1", 1280), ("5.2", 1280), ("8.2", 640)):
        shapes |= weight_and_bias(f"output_blocks.{name}.conv", c, c, 3, 3)
    return shapes | weight_and_bias("out.0", 320) | weight_and_bias("out.2", 4, 320, 3, 3)


def sd15_controlnet() -> Shapes:
    shapes = trunk()
    for block, c in enumerate([320] * 4 + [640] * 3 + [1280] * 5):
        shapes |= weight_and_bias(f"zero_convs.{block}.0", c, c, 1, 1)
    widths = [3, 16, 16, 32, 32, 96, 96, 256, 320]
    for i in range(8):
        shapes |= weight_and_bias(f"input_hint_block.{2 * i}", widths[i + 1], widths[i], 3, 3)
    return shapes | weight_and_bias("middle_block_out.0", 1280, 1280, 1, 1)


@pytest.mark.parametrize(
    ("build", "expected", "tensors", "parameters"),
    [
        (lambda: UNet(**SD15, out_channels=4), sd15_unet(), 686, 859_520_964),
        (lambda: ControlNet(**SD15, hint_channels=3), sd15_controlnet(), 340, 361_279_120),
    ],
    ids=["UNet", "ControlNet"],
)
def test_state_dict_of_sd15(build, expected, tensors, parameters):
    with torch.device("meta"):
        model = build()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert len(expected) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    packed = sum(len(m.parts) - 1 for m in model.modules() if isinstance(m, CrossAttention))
    assert len(list(model.parameters())) == tensors - packed


def test_sd21_on_the_meta_device():
    """Heads of 64 channels, linear projections, 1024 text features: 865,910,724 parameters."""
    params = SD15 | {"num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024}
    with torch.device("meta"):
        unet = UNet(**params, out_channels=4)
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
    assert [unet.input_blocks[i][1].transformer_blocks[0].attn1.heads for i in (1, 4, 7)] == [5, 10, 20]
    assert unet.middle_block[1].proj_in.weight.shape == (1280, 1280)


def test_signature_lists_the_parameters():
    unet, control = (set(inspect.signature(model).parameters) for model in (UNet, ControlNet))
    assert unet - control == {"out_channels"}
    assert control - unet == {"hint_channels", "hint_block_channels", "from_pretrained_unet"}
    documented = {word.strip(",:") for line in Architecture.__doc__.splitlines() for word in line.split()}
    assert not (unet & control) - documented


def test_parameters_without_effect():
    idle = {"image_size": 32, "use_fp16": True, "unet_precision": "fp16", "use_te_dpa": True, "timesteps": 1000}
    idle |= {"from_pretrained": "file", "from_NeMo": True, "offload_to_cpu": True}
    with torch.device("meta"):
        plain, given = UNet(**BASE, out_channels=4), UNet(**BASE, **idle, out_channels=4)
    assert list(plain.state_dict()) == list(given.state_dict()) and given.dtype == torch.float32


def test_lists_of_equal_entries():
    arch = Architecture(**BASE | {"context_dim": [24, 24], "num_res_blocks": [1, 1]})
    assert arch.context_dim == 24
    assert arch == Architecture(**BASE)


@pytest.mark.parametrize("name", ONLY_VALUES)
def test_values_that_are_not_built(name):
    with pytest.raises(ValueError, match=f"^{name} is 7; expected "):
        UNet(**BASE, out_channels=4, **{name: 7})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"in_channels": 0}, "in_channels is 0; expected a positive integer"),
        ({"model_channels": 48}, "model_channels is 48; expected a multiple of 32"),
        ({"model_channels": "320"}, "model_channels is '320'; expected"),
        ({"channel_mult": []}, r"channel_mult is \[\]; expected"),
        ({"channel_mult": "1,2"}, "channel_mult is '1,2'; expected"),
        ({"num_res_blocks": [1, 2, 3]}, r"num_res_blocks is \[1, 2, 3\]; expected .* the 2 levels of channel_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0; expected"),
        ({"attention_resolutions": [4]}, r"attention_resolutions is \[4\]; expected .* out of \[1, 2\]"),
        ({"attention_resolutions": 2}, "attention_resolutions is 2; expected"),
        ({"num_attention_blocks": [2, 1]}, r"num_attention_blocks is .*; expected at most num_res_blocks \(1, 1\)"),
        ({"num_attention_blocks": 1}, "num_attention_blocks is 1; expected"),
        ({"disable_self_attentions": [True]}, "disable_self_attentions is .* the 2 levels"),
        ({"num_heads": -1}, "num_heads is -1; expected .* num_head_channels is not given"),
        ({"num_heads": 5}, "num_heads is 5; expected a divisor of 32"),
        ({"num_heads": 0}, "num_heads is 0; expected a positive integer"),
        ({"num_heads_upsample": 3}, "num_heads_upsample is 3; expected a divisor of 32"),
        ({"num_head_channels": 24}, "num_head_channels is 24; expected a divisor of 32"),
        ({"transformer_depth": [1, 2, 3]}, r"transformer_depth is \[1, 2, 3\]; expected .* the 2 levels of"),
        ({"transformer_depth": 0}, "transformer_depth is 0; expected a positive integer"),
        ({"transformer_depth": [0, 2]}, r"transformer_depth is \(0, 2\); expected at least 1 at .* \[0, 1\]"),
        ({"transformer_depth_middle": 0}, "transformer_depth_middle is 0; expected a positive integer"),
        (
            {"transformer_depth": [1, 0], "attention_resolutions": [1]},
            "transformer_depth_middle is 0; expected a positive integer",
        ),
        ({"num_classes": 10}, "num_classes is 10; expected None or 'sequential'"),
        ({"num_classes": "sequential"}, "adm_in_channels is None; expected a positive integer"),
        ({"adm_in_channels": 8}, "adm_in_channels is 8; expected None, as num_classes is not set"),
        ({"context_dim": None}, "context_dim is None; expected a positive integer"),
        ({"context_dim": [24, 32]}, r"context_dim is \[24, 32\]; expected a positive integer"),
        ({"use_spatial_transformer": False}, "context_dim is 24; expected None"),
        ({"use_flash_attention": "yes"}, "use_flash_attention is 'yes'; expected a bool"),
        ({"dropout": 1.5}, r"dropout is 1.5; expected a probability"),
        ({"out_channels": None}, "out_channels is None; expected a positive integer"),
    ],
)
def test_impossible_values(params, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        UNet(**BASE | {"out_channels": 4} | params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"hint_channels": None}, "hint_channels is None; expected a positive integer"),
        ({"hint_channels": 3, "hint_block_channels": []}, r"hint_block_channels is \[\]; expected"),
    ],
)
def test_impossible_hints(params, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ControlNet(**BASE | params)


def test_unknown_and_missing_names():
    with pytest.raises(TypeError, match="'num_hedas'"):
        UNet(**BASE, out_channels=4, num_hedas=8)
    with pytest.raises(TypeError, match="'out_channels'"):
        UNet(**BASE)

"""Stable Diffusion XL's U-Net and ControlNet: counted against diffusers, and equal to it at reduced width."""

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from controlnet.checkpoints import folders
from controlnet.model.controlled import ControlledUNet
from controlnet.model.controlnet import ControlNet
from controlnet.model.layers import sinusoids
from controlnet.model.unet import UNet
from tests.controlnet import twins
from tests.controlnet.twins import assert_same, randomise

SDXL = {
    "in_channels": 4,
    "model_channels": 320,
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2],
    "channel_mult": [1, 2, 4],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "transformer_depth": [0, 2, 10],
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "legacy": False,
}
POOLED, TIME, CONTEXT = 10, 4, 24  # features of the pooled prompt, of each of six time ids, and of the context
SMALL = SDXL | {
    "model_channels": 32,
    "num_head_channels": 16,
    "context_dim": CONTEXT,
    "adm_in_channels": POOLED + 6 * TIME,
    "num_res_blocks": 1,
}
DEPTHS = {
    "no attention at level 0": {"transformer_depth": [0, 1, 3]},
    "attention everywhere": {"transformer_depth": [1, 2, 1], "attention_resolutions": [1, 2, 4], "num_res_blocks": 2},
    "the deepest level without": {"transformer_depth": [3, 2], "channel_mult": [1, 2], "attention_resolutions": [1, 2]},
    "one depth": {"transformer_depth": 5, "channel_mult": [1, 1], "attention_resolutions": [2]},
}


def on_meta(model, **params):
    with torch.device("meta"):
        return model(**params)


def theirs_of(ours, **changes):
    """diffusers' model of ours, by the config.json that we write for it."""
    config = folders.model_config(ours.arch) | changes
    name = config.pop("_class_name")
    return {"UNet2DConditionModel": UNet2DConditionModel, "ControlNetModel": ControlNetModel}[name](**config)


def test_counts_and_keys_at_full_size():
    """SDXL base: 2,567,463,684 parameters; its ControlNet as diffusers' from_unet makes it; every key has its twin."""
    unet = on_meta(UNet, **SDXL, out_channels=4)
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    control = on_meta(ControlNet, **SDXL, hint_channels=3)
    with torch.device("meta"):
        their_unet = theirs_of(unet)
        their_control = ControlNetModel.from_unet(their_unet, load_weights_from_unet=False)
    assert their_unet.config.attention_head_dim == [5, 10, 20]
    assert their_unet.config.transformer_layers_per_block == [1, 2, 10]
    for ours, theirs in ((unet, their_unet), (control, their_control)):
        names = twins.diffusers_names(ours)
        shapes = {names[name]: tensor.shape for name, tensor in ours.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    keys = set(unet.state_dict())
    assert {"label_emb.0.0.weight", "label_emb.0.2.bias", "input_blocks.8.1.transformer_blocks.9.norm3.bias"} <= keys
    assert not any(key.startswith(("input_blocks.9", "output_blocks.9")) for key in keys) and len(keys) == 1680


def pair(params):
    """ours and diffusers' with the same random weights, in float64: U-Nets, ControlNets."""
    pairs = []
    for model, own in ((UNet, {"out_channels": 4}), (ControlNet, {"hint_channels": 3})):
        ours = randomise(model(**SMALL | params, **own).double())
        theirs = theirs_of(ours, addition_time_embed_dim=TIME).double()
        names = twins.diffusers_names(ours)
        theirs.load_state_dict({names[name]: tensor for name, tensor in ours.state_dict().items()})
        pairs.append((ours, theirs))
    return pairs


def inputs(n=2, height=5, width=6):
    generator = torch.Generator().manual_seed(1)
    random = [torch.randn(n, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
              for shape in ((4, height, width), (7, CONTEXT), (POOLED,))]  # fmt: skip
    sizes = torch.tensor([[1024, 512, 0, 37, 1024, 1024], [600, 900, 5, 0, 768, 1344]])[:n]
    hint = torch.rand(n, 3, 8 * height, 8 * width, generator=generator, dtype=torch.float64)
    return *random, sizes, torch.tensor([999, 3])[:n], hint


@pytest.mark.parametrize("params", DEPTHS.values(), ids=DEPTHS)
def test_equals_diffusers(params):
    (unet, their_unet), (control, their_control) = pair(params)
    x, context, pooled, sizes, timesteps, hint = inputs()
    y = torch.cat([pooled, sinusoids(sizes, TIME).double()], dim=1)
    added = {"text_embeds": pooled, "time_ids": sizes}
    residuals = control(x, hint, timesteps, context, y=y)
    down, mid = their_control(x, timesteps, context, hint, added_cond_kwargs=added, return_dict=False)
    for ours, theirs in zip(residuals, [*down, mid], strict=True):
        assert_same(ours, theirs)
    got = unet(x, timesteps, context, residuals, y=y)
    want = their_unet(
        x, timesteps, context, added_cond_kwargs=added,
        down_block_additional_residuals=down, mid_block_additional_residual=mid,
    ).sample  # fmt: skip
    assert_same(got, want)
    assert_same(ControlledUNet(unet, control)(x, timesteps, context, hint, y=y), want)
    unet.requires_grad_(True)
    upstream = torch.randn_like(got)
    leaves = [x, context, pooled]
    got_grads = torch.autograd.grad(got, leaves, upstream, retain_graph=True)
    want_grads = torch.autograd.grad(want, leaves, upstream, retain_graph=True)
    for ours, theirs in zip(got_grads, want_grads, strict=True):
        assert_same(ours, theirs)
    unet(x, timesteps, context, control(x, hint, timesteps, context, y=y), y=y).backward(upstream)
    want.backward(upstream)
    twins.assert_same_gradients(unet, their_unet)
    twins.assert_same_gradients(control, their_control)


@torch.no_grad()
def test_prepared_inputs_and_the_cut_change_nothing():
    unet = randomise(UNet(**SMALL, out_channels=4).double())
    x, context, pooled, sizes, timesteps, _ = inputs()
    y = torch.cat([pooled, sinusoids(sizes, TIME).double()], dim=1)
    want = unet(x, timesteps, context, y=y)
    assert_same(unet(x, timesteps, unet.prepare_context(context), embedding=unet.embed(timesteps, y)), want)
    h, skips = unet.encode(x, timesteps, context, y=y)
    assert_same(unet.decode(h, skips, None, timesteps, context, y=y), want)
    assert (unet(x, timesteps, context, y=y.flip(0)) - want).abs().max() > 0.01, "y has no effect"


def test_a_vector_that_does_not_fit():
    unet = on_meta(UNet, **SMALL, out_channels=4)
    x, context = torch.zeros(2, 4, 4, 4, device="meta"), torch.zeros(2, 7, CONTEXT, device="meta")
    timesteps = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match=r"y is None; expected a tensor \[2, 34\]"):
        unet(x, timesteps, context)
    with pytest.raises(ValueError, match=r"y has shape \[1, 34\]; expected \[2, 34\]"):
        unet(x, timesteps, context, y=torch.zeros(1, 34, device="meta"))
    plain = on_meta(UNet, **twins.BASE, out_channels=4)
    with pytest.raises(ValueError, match=r"y has shape \[2, 34\]; expected None"):
        plain(x, timesteps, context, y=torch.zeros(2, 34, device="meta"))

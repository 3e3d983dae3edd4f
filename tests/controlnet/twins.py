"""Pairs of our models and diffusers' with the same random weights, and comparisons of their results and gradients."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from controlnet.checkpoints.diffusers import module_names, rename
from controlnet.model.controlnet import ControlNet
from controlnet.model.unet import UNet

BASE = {
    "in_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "context_dim": 24,
    "legacy": False,
}


@dataclass
class Case:
    """Parameters of ours over BASE, the same for diffusers, and the latent's [N, H, W]."""

    ours: dict[str, Any]
    theirs: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int, int] = (2, 4, 6)

    @property
    def params(self) -> dict[str, Any]:
        return BASE | self.ours

    @property
    def res_blocks(self) -> list[int]:
        count = self.params["num_res_blocks"]
        return [count] * len(self.params["channel_mult"]) if isinstance(count, int) else list(count)


CASES = {
    "sd15": Case({"channel_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attention_resolutions": [4, 2, 1],
                  "num_heads": 8}, size=(2, 8, 8)),
    "sd21": Case({"num_head_channels": 16, "num_heads": -1, "use_linear_in_transformer": True,
                  "use_flash_attention": True}, {"heads": (2, 4), "use_linear_projection": True}),
    "odd sizes, blocks per level, depth 2": Case(
        {"channel_mult": [1, 2, 3], "num_res_blocks": [1, 2, 1], "attention_resolutions": [2], "transformer_depth": 2,
         "num_heads": 2, "use_flash_attention": True},
        {"transformer_layers_per_block": 2}, size=(2, 7, 9)),
    "attention in the middle only": Case({"attention_resolutions": [], "use_scale_shift_norm": True},
                                         {"resnet_time_scale_shift": "scale_shift"}, size=(1, 5, 6)),
    "resblock_updown": Case({"attention_resolutions": [], "resblock_updown": True, "num_res_blocks": 2},
                            {"updown": "Resnet{}sampleBlock2D"}),
    "no self-attention at level 0": Case({"model_channels": 64, "disable_self_attentions": [True, False],
                                          "use_flash_attention": True}, {"only_cross_attention": (True, False)}),
    "one level, one head": Case({"channel_mult": [1], "num_heads": 1, "attention_resolutions": [1]}, size=(3, 3, 3)),
}  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, none zero: a zero convolution would hide what stands before it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            noise /= parameter[0].numel() ** 0.5
        elif name.endswith("weight"):  # of a norm
            noise = 1 + 0.1 * noise
        parameter.data.copy_(noise)
    return model


def diffusers_params(case: Case) -> dict[str, Any]:
    params, theirs = case.params, dict(case.theirs)
    levels = range(len(params["channel_mult"]))
    plain, crossed = theirs.pop("updown", "{}Block2D"), "CrossAttn{}Block2D"
    kinds = [crossed if 2**level in params["attention_resolutions"] else plain for level in levels]
    return {
        "in_channels": params["in_channels"],
        "block_out_channels": tuple(params["model_channels"] * mult for mult in params["channel_mult"]),
        "layers_per_block": tuple(case.res_blocks),
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "cross_attention_dim": params["context_dim"],
        "attention_head_dim": theirs.pop("heads", params["num_heads"]),  # a number of heads, whatever it is called
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
        **theirs,
    }


def unet_pair(case: Case) -> tuple[UNet, nn.Module]:
    from diffusers import UNet2DConditionModel  # here: the tests of our models alone run without diffusers

    ours = UNet(**case.params, out_channels=4)
    return _same_weights(ours, UNet2DConditionModel(**diffusers_params(case)))


def controlnet_pair(case: Case) -> tuple[ControlNet, nn.Module]:
    from diffusers import ControlNetModel

    ours = ControlNet(**case.params, hint_channels=3)
    params = diffusers_params(case)
    del params["up_block_types"]
    # ControlNetModel takes one number of blocks for all levels.
    return _same_weights(ours, ControlNetModel(**params | {"layers_per_block": case.res_blocks[0]}))


def _same_weights(ours: UNet | ControlNet, theirs: nn.Module) -> tuple[Any, Any]:
    randomise(ours.double())
    names = diffusers_names(ours)
    theirs.double().load_state_dict({names[name]: tensor for name, tensor in ours.state_dict().items()})
    return ours, theirs


def diffusers_names(model: UNet | ControlNet) -> dict[str, str]:
    """Our state_dict's names -> diffusers'."""
    names = module_names(model.arch)
    return {name: rename(name, names) for name in model.state_dict()}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, timesteps, context, hint in float64; all but the timesteps ask for a gradient."""
    generator = torch.Generator().manual_seed(1)
    n, height, width = case.size
    x = torch.randn(n, 4, height, width, generator=generator, dtype=torch.float64)
    context = torch.randn(n, 7, 24, generator=generator, dtype=torch.float64)
    hint = torch.rand(n, 3, 8 * height, 8 * width, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([999, 3, 500])[:n]
    return x.requires_grad_(), timesteps, context.requires_grad_(), hint.requires_grad_()


def assert_same(got: Tensor, want: Tensor, rtol: float = 1e-10) -> None:
    """No element further apart than rtol of the largest; and there is something to compare.

    The largest counts as 0.01 at least: before a norm of one channel per group, a bias has no gradient but rounding.
    """
    assert got.shape == want.shape and got.dtype == want.dtype
    largest = want.abs().max()
    assert largest > 0
    error = (got - want).abs().max()
    assert error <= rtol * largest.clamp(min=0.01), f"largest error {error:.3g}, largest value {largest:.3g}"


def assert_same_gradients(ours: UNet | ControlNet, theirs: nn.Module) -> None:
    names = diffusers_names(ours)
    want = dict(theirs.named_parameters())
    got = gradients(ours)
    assert len(got) == len(want)
    for name, gradient in got.items():
        assert_same(gradient, want[names[name]].grad)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients under the names of the state_dict, which has apart what is one parameter in the model."""
    holder = copy.deepcopy(model)
    for parameter, source in zip(holder.parameters(), model.parameters(), strict=True):
        parameter.data = source.grad
    return holder.state_dict()

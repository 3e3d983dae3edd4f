"""The ControlNet: a trainable copy of the U-Net's encoder that turns a hint into residuals for the decoder."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnkernels import recompute
from cnkernels.nn import ZeroConv2d
from controlnet.model.architecture import ControlNetArchitecture
from controlnet.model.layers import conv3x3, zeroed
from controlnet.model.scales import Scale, check_scale, controlled
from controlnet.model.unet import Context, Trunk, check_shape


class HintEncoder(nn.Sequential):
    """Convolutions with SiLU between them; backward recomputes the SiLUs instead of saving them."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = recompute.silu(x) if isinstance(layer, nn.SiLU) else layer(x)
        return x


def hint_encoder(hint_channels: int, stage_channels: Sequence[int], out_channels: int) -> HintEncoder:
    """Builds the hint encoder, pixels -> features of the latent's size: 3x3 convolutions and SiLU, the last one zero.

    The first stage keeps the resolution, each further one halves it.
    """
    convs = [conv3x3(hint_channels, stage_channels[0])]
    for channels, next_channels in zip(stage_channels, stage_channels[1:], strict=False):
        convs += [conv3x3(channels, channels), conv3x3(channels, next_channels, stride=2)]
    layers = [layer for conv in convs for layer in (conv, nn.SiLU())]
    return HintEncoder(*layers, zeroed(conv3x3(stage_channels[-1], out_channels)))


class ControlNet(Trunk):
    """A copy of the U-Net's encoder and middle block, with the hint added at the entry and zero convolutions as exits.

        h_0 = conv(x) + hint_encoder(hint);  h_i = block_i(h_(i-1), timesteps, context)
        output_i = scale_i * zero_conv_i(h_i)        i = 0 .. the number of input blocks; the last is the middle block

    The zero convolutions and the hint encoder's last convolution start at zero, hence the outputs do.

    Args:
        params: the fields of `ControlNetArchitecture`, by the names of the original implementation.

    Notes:
        The state_dict has the keys of the original checkpoints, without prefix.
        Zhang, Rao and Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", 2023.
    """

    __signature__ = inspect.signature(ControlNetArchitecture)  # of the constructor, for help() and configuration checks

    def __init__(self, **params: Any):
        arch = ControlNetArchitecture(**params)
        super().__init__(arch)
        self.zero_convs = nn.ModuleList(nn.Sequential(ZeroConv2d(width, width)) for width in self.skip_channels)
        self.input_hint_block = hint_encoder(arch.hint_channels, arch.hint_block_channels, arch.model_channels)
        width = self.skip_channels[-1]
        self.middle_block_out = nn.Sequential(ZeroConv2d(width, width))

    @torch.no_grad()
    def copy_from(self, unet: Trunk) -> None:
        """Copies timestep embedding, encoder and middle block from the U-Net; the rest is unchanged.

        Raises:
            ValueError: the U-Net lacks one of these tensors, or has it in another shape.
        """
        own_layers = ("zero_convs.", "input_hint_block.", "middle_block_out.")
        source = unet.state_dict()
        for name, tensor in self.state_dict().items():
            if name.startswith(own_layers):
                continue
            got = list(source[name].shape) if name in source else "missing"
            if got != list(tensor.shape):
                raise ValueError(f"unet: {name} is {got}; expected {list(tensor.shape)}")
            tensor.copy_(source[name])

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Encodes a hint [N, hint_channels, H, W] in [0, 1] to features [N, model_channels, H / f, W / f].

        f = arch.hint_factor, 8 for Stable Diffusion. A hint that stays the same over many calls is encoded once.
        """
        check_shape("hint", hint, "N", self.arch.hint_channels, "H", "W")
        return self.input_hint_block(hint.to(self.dtype))

    def forward(
        self,
        x: Tensor,
        hint: Tensor | None,
        timesteps: Tensor,
        context: Context = None,
        *,
        residuals: Sequence[Tensor | None] | None = None,
        scales: Scale | Sequence[Scale] = 1.0,
        guided_hint: Tensor | None = None,
        y: Tensor | None = None,
    ) -> list[Tensor]:
        """Computes the residuals of the U-Net's skips, then of its middle block: 13 tensors for Stable Diffusion.

        Args:
            x: [N, in_channels, H, W], the same latents as the U-Net's, cast to the dtype of the weights.
            hint: [N, hint_channels, f * H, f * W] in [0, 1]; not read if guided_hint is given.
            timesteps: [N], integer or float, in the units of training.
            context: [N, T, context_dim], or `prepare_context` of it.
            residuals: the U-Net's skips and h. If given, each output is residual + scale * zero_conv(feature), ready
                for `UNet.decode` without control: the addition is fused into the convolution.
            scales: strength of the control, one for all outputs or one for each: a number, a tensor 0-d or [N], or a
                mask [N, 1, h, w] or [1, 1, h, w] of any size, averaged over areas to the size of each output. A number
                that changes from call to call is better a tensor: nothing is compiled again.
            guided_hint: `encode_hint(hint)`, if it has been computed before.
            y: [N, adm_in_channels], of a model with `num_classes` (Stable Diffusion XL).
        """
        self._check_inputs(x, timesteps, context)
        count = len(self.skip_channels) + 1
        scales = scales if isinstance(scales, Sequence) else [scales] * count
        residuals = [None] * count if residuals is None else residuals
        for name, given in (("scales", scales), ("residuals", residuals)):
            if len(given) != count:
                raise ValueError(f"{name} has {len(given)} entries; expected {count}, one for each output")

        n, _, height, width = x.shape
        for scale in scales:
            check_scale(scale, n)
        if guided_hint is None:
            f = self.arch.hint_factor
            check_shape("hint", hint, n, self.arch.hint_channels, f * height, f * width)
            guided_hint = self.encode_hint(hint)
        check_shape("guided_hint", guided_hint, n, self.arch.model_channels, height, width)
        features = self._trunk(x, self.embed(timesteps, y), self._cast(context), guided_hint)
        zero_convs = [conv[0] for conv in (*self.zero_convs, self.middle_block_out)]
        return controlled(zero_convs, features, residuals, scales)

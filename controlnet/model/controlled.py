"""One prediction of the locked U-Net with its ControlNet: `ControlledUNet`."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from controlnet.model.layers import Prepared


class ControlledUNet(nn.Module):
    """The locked U-Net with a ControlNet beside its encoder.

    h, skips = encode(x);  control = ControlNet(x, hint)
    prediction = decode(h + scale_mid * control_mid, [skip_i + scale_i * control_i])

    Args:
        unet: UNet. Its encoder and middle block are never trained and run without gradients.
        control: ControlNet, all trained.
        sd_locked: True freezes the U-Net's decoder (`output_blocks`, `out`) too; False trains it.
        only_mid_control: only the middle block is controlled. The zero convolutions of the skips then cannot receive
            a gradient and are frozen: every parameter that requires a gradient gets one, as DDP wants it.
    """

    def __init__(self, unet: nn.Module, control: nn.Module, *, sd_locked: bool = True, only_mid_control: bool = False):
        super().__init__()
        self.unet = unet
        self.control = control
        self.sd_locked = sd_locked
        self.only_mid_control = only_mid_control
        self.unet.requires_grad_(False)
        self.control.requires_grad_(True)
        if not sd_locked:
            self.unet.output_blocks.requires_grad_(True)
            self.unet.out.requires_grad_(True)
        if only_mid_control:
            self.control.zero_convs.requires_grad_(False)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that the optimizer updates."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def prepare_context(self, context: Tensor) -> Tensor | tuple[Prepared, Prepared]:
        """Computes the keys and values of a context [N, T, D] in both models, for use as `context` of many calls."""
        if not self.unet.arch.use_spatial_transformer:
            return context  # no layer reads it
        return self.unet.prepare_context(context), self.control.prepare_context(context)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | tuple[Prepared, Prepared],
        hint: Tensor | None = None,
        *,
        guided_hint: Tensor | None = None,
        scales: float | Tensor | Sequence[float | Tensor] = 1.0,
        y: Tensor | None = None,
    ) -> Tensor:
        """Predicts at x: returns [N, C, h, w].

        Args:
            x: [N, C, h, w] noisy latents.
            timesteps: int64 [N].
            context: [N, T, D] text states, or `prepare_context` of them.
            hint: [N, 3, H, W] in [0, 1]; None with guided_hint None gives the uncontrolled prediction.
            guided_hint: `control.encode_hint(hint)`, computed once for many calls.
            scales: strength of the control, one for all outputs or one each: a number, a tensor 0-d or [N], or a mask
                [N, 1, h, w]. The number 0 skips the ControlNet altogether.
            y: [N, adm_in_channels], the vector of models with `num_classes` (Stable Diffusion XL).
        """
        context, control_context = context if isinstance(context, tuple) else (context, context)
        with torch.no_grad():
            embedding = self.unet.embed(timesteps, y)
            h, skips = self.unet.encode(x, timesteps, context, embedding=embedding)
        uncontrolled = hint is None and guided_hint is None
        if uncontrolled or (isinstance(scales, (int, float)) and scales == 0):
            return self.unet.decode(h, skips, None, timesteps, context, embedding=embedding)
        if self.only_mid_control:  # outputs with scale 0 are not computed
            middle = scales[-1] if isinstance(scales, (list, tuple)) else scales
            scales = [0] * len(skips) + [middle]
        controlled = self.control(
            x, hint, timesteps, control_context, y=y, residuals=[*skips, h], scales=scales, guided_hint=guided_hint
        )
        return self.unet.decode(controlled[-1], controlled[:-1], None, timesteps, context, embedding=embedding)

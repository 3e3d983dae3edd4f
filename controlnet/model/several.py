"""Several ControlNets on one U-Net, each with its own hint and weight, behind the interface of one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from controlnet.model.controlnet import ControlNet
from controlnet.model.layers import Prepared
from controlnet.model.scales import Scale


class SeveralControlNets(nn.Module):
    """The weighted sum of ControlNets, as the `control` of a `ControlledUNet`.

        output_i = residual_i + scale_i * sum_k weight_k * output_ki

    Args:
        controls: ControlNets of one architecture but for their hints.
        weights: one number each; a ControlNet of weight 0 is not computed.

    A hint is those of all ControlNets joined along the channels, [N, sum of hint_channels, H, W].

    Raises:
        ValueError: the ControlNets differ in what they give, or the weights in number.
    """

    def __init__(self, controls: Sequence[ControlNet], weights: Sequence[float]):
        super().__init__()
        if len(weights) != len(controls):
            raise ValueError(f"{len(weights)} weights for {len(controls)} ControlNets; expected one for each")
        first = controls[0]
        for number, control in enumerate(controls[1:], 2):
            for name, ours, theirs in (
                ("latent channels", control.arch.in_channels, first.arch.in_channels),
                ("features of the context", control.arch.context_dim, first.arch.context_dim),
                ("output channels", list(control.skip_channels), list(first.skip_channels)),
                ("shrinking of the hint", control.arch.hint_factor, first.arch.hint_factor),
            ):
                if ours != theirs:
                    raise ValueError(f"ControlNet {number} has {name} {ours}; expected {theirs}, as the first one has")
        self.controls = nn.ModuleList(controls)
        self.weights = list(weights)
        self.hint_channels = [control.arch.hint_channels for control in controls]
        self.feature_channels = [control.arch.model_channels for control in controls]

    @property
    def zero_convs(self) -> nn.ModuleList:
        return self.controls[0].zero_convs

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Encodes all hints: returns [N, sum of model_channels, h, w]."""
        hints = hint.split(self.hint_channels, dim=1)
        return torch.cat([control.encode_hint(part) for control, part in zip(self.controls, hints, strict=True)], 1)

    def prepare_context(self, context: Tensor) -> list[Prepared]:
        """Computes each ControlNet's keys and values of a context; see `Trunk.prepare_context`."""
        return [control.prepare_context(context) for control in self.controls]

    def forward(
        self,
        x: Tensor,
        hint: Tensor | None,
        timesteps: Tensor,
        context: Tensor | list[Prepared],
        *,
        y: Tensor | None = None,
        residuals: Sequence[Tensor],
        scales: Scale | Sequence[Scale] = 1.0,
        guided_hint: Tensor | None = None,
    ) -> list[Tensor]:
        """As `ControlNet.forward`; each ControlNet adds to the outputs of the one before."""
        features = (self.encode_hint(hint) if guided_hint is None else guided_hint).split(self.feature_channels, dim=1)
        contexts = context if isinstance(context, list) else [context] * len(self.controls)
        scales = scales if isinstance(scales, Sequence) else [scales] * len(residuals)
        outputs = list(residuals)
        for control, weight, feature, its in zip(self.controls, self.weights, features, contexts, strict=True):
            if weight != 0:
                weighted = [weight * scale for scale in scales]
                given = {"y": y, "residuals": outputs, "scales": weighted, "guided_hint": feature}
                outputs = control(x, None, timesteps, its, **given)
        return outputs

"""Drop-in classes for diffusers' UNet2DConditionModel and ControlNetModel, whose forward is this library's."""

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from controlnet.diffusers.binding import Binding, Unserved
from controlnet.model.scales import Scale


class _Accelerated:
    """What the drop-in classes share: a binding that follows the module, and the way back to diffusers' forward."""

    OWN = ("_binding", "_unserved", "_pipelines", "_warned", "_compile", "_was_contiguous")  # attributes of instances
    _binding: Binding | None = None
    _unserved: str | None = "a module that was never bound"  # why there is no binding, or no use for it now
    _pipelines: Sequence[weakref.ref] = ()  # in which the module stands: their schedulers' timesteps are prepared
    _warned: frozenset[str] = frozenset()
    _compile: Mapping[str, Any] | None = None  # arguments of torch.compile for the binding's model
    _was_contiguous = False  # the weights, before `accelerate` made them channels_last

    def bind(self) -> None:
        """Binds the module as it is now, and forgets what was kept of earlier calls."""
        try:
            self._binding = Binding(self, self._compile)
            self._unserved = self._binding.watch.feature()
        except Unserved as unserved:
            self._binding, self._unserved = None, str(unserved)

    @torch.compiler.disable
    def _follow(self) -> Binding | None:
        """The binding, made again if the module was changed; None, after one warning, if diffusers has to compute."""
        if self._binding is None or not self._binding.watch.unchanged():
            self.bind()
        else:
            self._unserved = self._binding.watch.feature()
        if self._unserved is not None:
            self._warn(self._unserved)
        return self._binding if self._unserved is None else None

    def _served(self, **unserved: Any) -> Binding | None:
        """The binding that serves a call, or None; `unserved` are the arguments that have to be None."""
        given = [name for name, value in unserved.items() if value is not None]
        if torch.compiler.is_compiling() and "_binding" in vars(self):
            # Compiled code cannot look for changes: its guards see what the last `bind` found (see `_CHANGES`).
            return self._binding if self._unserved is None and not given else None
        if given:
            self._warn(f"the argument {given[0]}")
            return None
        return self._follow()

    def _warn(self, feature: str) -> None:
        if feature not in self._warned:
            self._warned |= {feature}
            name = type(self).__name__
            what = f"{name}: {feature} is not served by the fast path; diffusers computes such calls itself"
            warnings.warn(what, stacklevel=4)

    def _schedules(self) -> Iterator[Any]:
        for reference in self._pipelines:
            pipeline = reference()
            if pipeline is not None:
                yield getattr(pipeline.scheduler, "timesteps", None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in self.OWN[:4]}  # a copy binds itself

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The class says that it is diffusers' (see below), where pickle would look for it and find another.
        return _empty, (type(self)._name_here,), self.__getstate__()


class UNet2DConditionModel(_Accelerated, diffusers.UNet2DConditionModel):
    """`diffusers.UNet2DConditionModel` with a faster forward: the same arguments, weights, configuration and files.

    A call that the fast path does not serve takes diffusers' own, after one warning that names what was asked for.
    """

    __module__ = diffusers.UNet2DConditionModel.__module__  # a pipeline is saved with diffusers' class, for anyone
    _name_here = "UNet2DConditionModel"

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As diffusers' forward: sample [N, C, h, w], encoder_hidden_states [N, T, D] -> prediction [N, C, h, w]."""
        down, middle = down_block_additional_residuals, mid_block_additional_residual
        binding = self._served(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            cross_attention_kwargs=_beyond_scale(cross_attention_kwargs),
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            down_block_additional_residuals=down if middle is None else None,
            mid_block_additional_residual=middle if down is None else None,
        )
        if binding is None:
            return super().forward(
                sample,
                timestep,
                encoder_hidden_states,
                class_labels=class_labels,
                timestep_cond=timestep_cond,
                attention_mask=attention_mask,
                cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=added_cond_kwargs,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                down_intrablock_additional_residuals=down_intrablock_additional_residuals,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=return_dict,
            )
        control = None if down is None else [*down, middle]
        prediction = binding.unet(sample, timestep, encoder_hidden_states, control, self._schedules())
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


class ControlNetModel(_Accelerated, diffusers.ControlNetModel):
    """`diffusers.ControlNetModel` with a faster forward: the same arguments, weights, configuration and files.

    With conditioning_scale 0 (a step outside the control's window) nothing is computed. A call that the fast path does
    not serve takes diffusers' own, after one warning that names what was asked for.
    """

    __module__ = diffusers.ControlNetModel.__module__
    _name_here = "ControlNetModel"

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: Scale = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
        """As diffusers' forward; conditioning_scale may also be a tensor [N] or a mask [N, 1, h, w], see `ControlNet`.

        Returns:
            the 12 residuals for the skips and the one for the middle block; all zeros, broadcast from one element, for
            a conditioning_scale of 0.
        """
        binding = self._served(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=_beyond_scale(cross_attention_kwargs),
        )
        if binding is None:
            return super().forward(
                sample,
                timestep,
                encoder_hidden_states,
                controlnet_cond,
                conditioning_scale=conditioning_scale,
                class_labels=class_labels,
                timestep_cond=timestep_cond,
                attention_mask=attention_mask,
                added_cond_kwargs=added_cond_kwargs,
                cross_attention_kwargs=cross_attention_kwargs,
                guess_mode=guess_mode,
                return_dict=return_dict,
            )
        count = len(self.controlnet_down_blocks) + 1
        scales = _scales(conditioning_scale, count, guess_mode)
        if all(isinstance(scale, (int, float)) and scale == 0 for scale in scales):
            outputs = binding.zeros(sample)
        else:
            outputs = binding.controlnet(
                sample, timestep, encoder_hidden_states, controlnet_cond, scales, self._schedules()
            )
        *down, middle = outputs
        if not return_dict:
            return down, middle
        return ControlNetOutput(down_block_res_samples=down, mid_block_res_sample=middle)


def _beyond_scale(arguments: dict[str, Any] | None) -> dict[str, Any] | None:
    """What cross_attention_kwargs asks for besides the scale of a LoRA, which is without effect where there is none."""
    return {key: value for key, value in (arguments or {}).items() if key != "scale"} or None


def _scales(scale: Scale, count: int, guess_mode: bool) -> list[Scale]:
    """The scale of each output; in guess mode 0.1 for the first to 1 for the last, evenly on a logarithmic scale."""
    if isinstance(scale, Tensor) and (scale.numel() == 1 or (scale.dim() == 4 and scale.shape[1:] == (1, 1, 1))):
        scale = scale.reshape(() if scale.numel() == 1 else -1)
    if not guess_mode:
        return [scale] * count
    return [scale * math.pow(10, i / (count - 1) - 1) for i in range(count)]


def _then_bind(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def changed(self: _Accelerated, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if "_binding" in vars(self):
            self.bind()
        return result

    return changed


# diffusers' methods that change what a module computes. Eager calls notice by themselves, but for weights into which a
# LoRA was merged through `.data`; compiled ones do not.
_CHANGES = (
    "add_adapter",
    "load_lora_adapter",
    "delete_adapters",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora",
    "set_attn_processor",
    "_load_ip_adapter_weights",
    "enable_freeu",
    "disable_freeu",
    "enable_gradient_checkpointing",
    "disable_gradient_checkpointing",
)
for _cls in (UNet2DConditionModel, ControlNetModel):
    for _name in _CHANGES:
        if hasattr(_cls, _name):
            setattr(_cls, _name, _then_bind(getattr(_cls, _name)))

DROP_INS = {cls.__mro__[2]: cls for cls in (UNet2DConditionModel, ControlNetModel)}


def _empty(name: str) -> Any:
    cls = globals()[name]
    return cls.__new__(cls)

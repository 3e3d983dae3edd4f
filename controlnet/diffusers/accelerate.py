"""`accelerate` and `restore`: diffusers' pipelines and models made faster in place, and as they were."""

import functools
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeVar

import diffusers
import torch
from diffusers.loaders import peft
from torch import nn

from cnkernels.tune import first_call
from controlnet.diffusers import blocks, exits, memo
from controlnet.diffusers.layers import Shared
from controlnet.inference.graph import CudaRecorder, Recorder

Target = TypeVar("Target")

TESTED = ((0, 40), (0, 42))  # releases of diffusers, first and last
MODELS = ("UNet2DConditionModel", "ControlNetModel", "MultiControlNetModel", "AutoencoderKL")
_KNOWN = tuple(getattr(diffusers, name) for name in MODELS)
_OWN = ("_cn", "_cn_name", "_cn_kept", "_cn_contiguous", "_cn_hooks")  # attributes that `restore` removes
_ORIGINALS = {cls: original for original, cls in blocks.SWAPS.items()}
_ORIGINALS |= {exits.ZeroConv: nn.Conv2d, blocks.GroupNorm: nn.GroupNorm}
# Methods that write through `.data`, which version counters do not show.
_WRITERS = {"EMAModel": ("copy_to", "restore"), "PeftAdapterMixin": ("fuse_lora", "unfuse_lora")}


def accelerate(
    target: Target,
    *,
    graph: bool = False,
    tune: bool = False,
    channels_last: bool = True,
    recorder: Recorder | None = None,
) -> Target:
    """Makes a diffusers pipeline or model compute by fused kernels, in place; the weights stay the same tensors.

    The blocks inside (residual blocks, attention, transformers, the ControlNet's zero convolutions) get subclasses of
    their classes with a faster forward; diffusers' own forward of the model goes on calling them. A block that its fast
    forward does not support (other layers in it, hooks, another attention processor, an attention mask) runs diffusers'
    own code, after one warning that names it; the blocks around it stay fast. LoRA layers, quantised and offloaded
    layers are called as modules.

    Between the steps of a denoising loop the encoded hint and the keys and values of the prompt are kept, as long as
    their inputs and weights stay the same.

    With `graph`, the steps of U-Net and ControlNets are CUDA graphs: captured at the first step, in seconds, and then
    replayed (see `controlnet.inference.graph.StepGraph`).

    Args:
        target: a pipeline with a UNet2DConditionModel (Stable Diffusion 1, 2 and XL, with or without ControlNets), or
            one of UNet2DConditionModel, ControlNetModel, MultiControlNetModel and AutoencoderKL; compiled ones too.
        graph: run inference steps as CUDA graphs. Another size, dtype, LoRA or change of a module captures again;
            timestep, scales (of ControlNets and LoRAs), prompt and hint are copied. Without a GPU, and with gradients,
            calls are eager.
        tune: at the first image, check the kernels and measure which are fastest for its shapes (`cnkernels.tune`),
            in seconds. Earlier measurements of this machine are read from a file. Compiled models are left alone.
        channels_last: convert the convolutions' weights to channels_last, with the same values. False is for code that
            flattens parameters with `view`, such as torch.nn.utils.parameters_to_vector; the kernels serve contiguous
            weights, too, but a convolution on a GPU then converts its weight at every call.
        recorder: captures the graphs of all models; None for torch.cuda.CUDAGraph.

    Returns:
        `target`. A second time it changes nothing.

    Raises:
        TypeError: `target` is none of these; the message lists them.
        ValueError: a model is spread over several devices.
        ImportError: this release of diffusers has not been tested.

    Notes:
        One change of an input or weight of kept values is not noticed: a write through `.data` into the same memory
        (`weight.data.mul_(2)`), which PyTorch does not count. Call `controlnet.diffusers.forget()` after it; diffusers'
        EMAModel, fuse_lora and unfuse_lora do so from the first `accelerate` on. Assigning `.data` is noticed.
        Under torch.jit.trace, torch.func, forward-mode derivatives and hooks on all modules diffusers' own code runs.
        Gradients can be differentiated again (create_graph=True).
    """
    _check_release()
    models = _models(target)
    for model in models:
        _check_devices(model)
    _make_writers_forget()
    recorder = CudaRecorder() if recorder is None else recorder
    for model in models:
        _swap(model, channels_last)
        is_step = not isinstance(model, diffusers.AutoencoderKL)  # whose forward nobody calls
        if tune and is_step:
            first_call.at_first_call(model, _call_without_graph)
        if graph and is_step:
            _step_by_graph(model, recorder)
    return target


def restore(target: Target) -> Target:
    """Undoes `accelerate`: classes, forwards and memory formats are as before.

    Args:
        target: as for `accelerate`.

    Returns:
        `target`.

    Raises:
        TypeError: `target` is none of the supported kinds.
    """
    for model in _models(target):
        first_call.never(model)
        for name in ("forward", "_old_forward"):
            if isinstance(model.__dict__.get(name), exits.Stepper):
                model.__dict__.pop(name).graph.reset()
                if name == "_old_forward":
                    model.__dict__[name] = types.MethodType(type(model).forward, model)
        if model.__dict__.get("_cn_contiguous", False):
            model.to(memory_format=torch.contiguous_format)
        for hook in model.__dict__.get("_cn_hooks", ()):
            hook.remove()
        for module in model.modules():
            if type(module) in _ORIGINALS:
                _retype(module, _ORIGINALS[type(module)])
            for name in _OWN:
                module.__dict__.pop(name, None)
    return target


def _call_without_graph(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    steppers = [value for value in model.__dict__.values() if isinstance(value, exits.Stepper)]
    try:
        for stepper in steppers:
            stepper.eager = True
        return model(*args, **kwargs)
    finally:
        for stepper in steppers:
            stepper.eager = False


def _models(target: Any) -> list[nn.Module]:
    """The models in `target` whose blocks may be swapped."""
    target = getattr(target, "_orig_mod", target)
    if isinstance(target, diffusers.MultiControlNetModel):
        return [model for net in target.nets for model in _models(net)]
    if isinstance(target, _KNOWN):
        return [target]
    if isinstance(target, diffusers.DiffusionPipeline):
        parts = [getattr(target, name, None) for name in ("unet", "controlnet", "vae")]
        parts = [getattr(part, "_orig_mod", part) for part in parts]
        if isinstance(parts[0], diffusers.UNet2DConditionModel):
            return [model for part in parts if isinstance(part, _KNOWN) for model in _models(part)]
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    raise TypeError(
        f"target is a {kind}; expected a pipeline with a UNet2DConditionModel (Stable Diffusion 1, 2, XL) or one of "
        f"{', '.join(MODELS)}"
    )


def _swap(model: nn.Module, channels_last: bool) -> None:
    if "_cn" in model.__dict__:
        return
    found = {name: module for name, module in model.named_modules() if type(module) in blocks.SWAPS}
    shared = Shared([m for m in found.values() if getattr(m, "time_emb_proj", None) is not None])
    for name, module in list(model.named_modules()):
        if name.endswith("conv_norm_out") and type(module) is nn.GroupNorm:
            _retype(module, blocks.GroupNorm)
    for name, module in found.items():
        _retype(module, blocks.SWAPS[type(module)])
        module.__dict__.update(_cn=shared, _cn_name=name)
    if isinstance(model, diffusers.ControlNetModel):
        for conv in (*model.controlnet_down_blocks, model.controlnet_mid_block):
            if type(conv) is nn.Conv2d:
                _retype(conv, exits.ZeroConv)
        before = model.register_forward_pre_hook(exits.enter, with_kwargs=True)
        after = model.register_forward_hook(exits.leave, with_kwargs=True, always_call=True)
        model.__dict__["_cn_hooks"] = (before, after)
    model.__dict__["_cn"] = shared
    if channels_last:
        model.__dict__["_cn_contiguous"] = all(p.is_contiguous() for p in model.parameters())
        model.to(memory_format=torch.channels_last)


def _step_by_graph(model: nn.Module, recorder: Recorder) -> None:
    name = "_old_forward" if "_old_forward" in model.__dict__ else "forward"  # inside of accelerate's offloading
    if not isinstance(model.__dict__.get(name), exits.Stepper):
        model.__dict__[name] = exits.Stepper(model, recorder)


def _retype(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes `module` an instance of `cls`, also where accelerate's offloading has put its forward into a hook."""
    before, module.__class__ = type(module), cls
    for name in ("forward", "_old_forward"):
        method = module.__dict__.get(name)
        if isinstance(method, types.MethodType) and method.__func__ is before.forward:
            module.__dict__[name] = types.MethodType(cls.forward, module)


def _make_writers_forget() -> None:
    from diffusers import training_utils

    for owner, name in [(owner, name) for owner, names in _WRITERS.items() for name in names]:
        cls = getattr(training_utils, owner, None) or getattr(peft, owner)
        method = getattr(cls, name)
        if not getattr(method, "_cn_forgets", False):
            setattr(cls, name, _then_forget(method))


def _then_forget(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def forgetting(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        finally:
            memo.forget()

    forgetting._cn_forgets = True
    return forgetting


def _check_devices(model: nn.Module) -> None:
    devices = {str(p.device) for p in model.parameters() if not p.is_meta}
    if len(devices) > 1:
        raise ValueError(
            f"target has a {type(model).__name__} on {', '.join(sorted(devices))}; expected all of it on one device"
        )


def _check_release() -> None:
    installed = metadata.version("diffusers")
    first, last = (".".join(map(str, release)) for release in TESTED)
    if not TESTED[0] <= tuple(map(int, installed.split(".")[:2])) <= TESTED[1]:
        raise ImportError(f"diffusers {installed} is installed; controlnet.accelerate is tested with {first} to {last}")

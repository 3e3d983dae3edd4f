"""`accelerate` and `restore`: diffusers' pipelines and models made faster in place, and as they were."""

import types
import weakref
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any, TypeVar

import diffusers
import torch
from torch import nn

from controlnet.diffusers import models, vae

Target = TypeVar("Target")

TESTED = ((0, 40), (0, 42))  # releases of diffusers, first and last
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
)
MODELS = ("UNet2DConditionModel", "ControlNetModel", "MultiControlNetModel", "AutoencoderKL")
_DROP_INS = models.DROP_INS | vae.DROP_INS
_ORIGINALS = {drop_in: original for original, drop_in in _DROP_INS.items()}


def accelerate(target: Target, *, compile: Mapping[str, Any] | None = None) -> Target:
    """Makes a diffusers pipeline or model compute by fused kernels, in place; the weights stay the same tensors.

    The class of each U-Net, ControlNet, VAE encoder and decoder becomes a subclass of itself with another forward.
    Convolution weights become channels_last, with the same values. What the pipeline can do it still does: a call that
    asks for more than the fast path has (a LoRA that is not fused, an IP-Adapter, an attention mask, a custom attention
    processor, FreeU, class embeddings, hooks inside the model) runs diffusers' own forward, after one warning.

    Between the steps of a denoising loop the encoded hint, the keys and values of the prompt and the timestep
    embeddings of the schedule are kept, as long as what they were made of stays the same.

    Args:
        target: a StableDiffusion pipeline (plain, img2img, inpaint; each with or without ControlNet), or one of
            UNet2DConditionModel, ControlNetModel, MultiControlNetModel and AutoencoderKL; compiled ones too.
        compile: arguments for torch.compile, such as {"mode": "max-autotune"}, by which U-Net and ControlNets are
            compiled at their first call. Unlike in `torch.compile(pipe.unet)`, what is kept between steps still is.

    Returns:
        `target`. A second time it changes nothing, unless `compile` is another.

    Raises:
        TypeError: `target` is none of these; the message lists them.
        ImportError: this release of diffusers has not been tested.

    Notes:
        Values kept from an earlier step notice every change of their inputs but one: a write through `.data` into the
        same memory (`weight.data.mul_(2)`), which PyTorch does not count. Assigning `.data` is noticed.
    """
    _check_release()
    for module in _parts(target):
        drop_in = _DROP_INS.get(type(module))
        if drop_in is not None:
            _swap(module, drop_in)
            _channels_last(module)
        if not isinstance(module, models._Accelerated):
            continue
        if drop_in is not None or (compile is not None and compile != module._compile):
            module._compile = compile
            module.bind()
        if isinstance(target, diffusers.DiffusionPipeline):
            known = [reference for reference in module._pipelines if reference() not in (None, target)]
            module._pipelines = (*known, weakref.ref(target))
    return target


def restore(target: Target) -> Target:
    """Undoes `accelerate`: classes, forwards and memory formats are as before. Returns `target`.

    What was made by the drop-in classes themselves becomes the diffusers model of the same name.
    """
    for module in _parts(target):
        original = _ORIGINALS.get(type(module))
        if original is not None:
            if getattr(module, "_was_contiguous", False):
                module.to(memory_format=torch.contiguous_format)
            own = type(module).OWN
            _swap(module, original)
            for name in own:
                vars(module).pop(name, None)
    return target


def _parts(target: Any) -> Iterator[nn.Module]:
    """The modules in `target` whose classes may be swapped."""
    target = getattr(target, "_orig_mod", target)
    if isinstance(target, tuple(getattr(diffusers, name) for name in PIPELINES)):
        for component in (target.unet, target.vae, getattr(target, "controlnet", None)):
            component = getattr(component, "_orig_mod", component)
            if isinstance(component, tuple(getattr(diffusers, name) for name in MODELS)):
                yield from _parts(component)
    elif isinstance(target, diffusers.MultiControlNetModel):
        for net in target.nets:
            yield from _parts(net)
    elif isinstance(target, diffusers.AutoencoderKL):
        yield from (target.encoder, target.decoder)
    elif type(target) in _DROP_INS or type(target) in _ORIGINALS:
        yield target
    else:
        kind = f"{type(target).__module__}.{type(target).__qualname__}"
        raise TypeError(f"target is a {kind}; expected one of {', '.join((*PIPELINES, *MODELS))}")


def _swap(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes `module` an instance of `cls`, also where accelerate's offloading has put its forward into a hook."""
    before, module.__class__ = type(module), cls
    for name in ("forward", "_old_forward"):
        method = vars(module).get(name)
        if isinstance(method, types.MethodType) and method.__func__ is before.forward:
            vars(module)[name] = types.MethodType(cls.forward, module)


def _channels_last(module: nn.Module) -> None:
    """channels_last weights are read in place by the convolutions; others would be copied at every call."""
    module._was_contiguous = all(p.is_contiguous() for p in module.parameters())
    module.to(memory_format=torch.channels_last)


def _check_release() -> None:
    installed = metadata.version("diffusers")
    first, last = (".".join(map(str, release)) for release in TESTED)
    if not TESTED[0] <= tuple(map(int, installed.split(".")[:2])) <= TESTED[1]:
        raise ImportError(f"diffusers {installed} is installed; controlnet.accelerate is tested with {first} to {last}")

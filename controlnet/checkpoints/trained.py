"""The trained weights of a run's checkpoint: written under the original's names, and put back into a model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlnet.checkpoints.errors import CheckpointError
from controlnet.checkpoints.runs import AVERAGE
from controlnet.checkpoints.write import heads_metadata
from controlnet.model.controlled import ControlledUNet

CONTROL_PREFIX, UNET_PREFIX = "control_model.", "model.diffusion_model."


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights that require a gradient, in place, under the names of the state_dict: those of checkpoints."""
    with torch.enable_grad():  # else views of a trainable parameter would not require one
        state = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if tensor.requires_grad}


def prefixed(name: str) -> str:
    """The name of a ControlledUNet's parameter in the original's checkpoints."""
    part, _, rest = name.partition(".")
    return {"control": CONTROL_PREFIX, "unet": UNET_PREFIX}[part] + rest


def save_tensors(tensors: Mapping[str, Tensor], path: Path, stated: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes a safetensors file; `stated` is metadata beside the tensors."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(cpu, path, metadata={"format": "pt", **stated})


def model_files(model: ControlledUNet) -> dict[str, Callable[[Path], None]]:
    """Writers of the files that hold the trained weights."""

    def part(name: str) -> Callable[[Path], None]:
        module = getattr(model, name)
        stated = heads_metadata({name: module.arch})
        return lambda path: save_tensors(
            {prefixed(f"{name}.{k}"): v for k, v in module.state_dict().items()}, path, stated
        )

    files = {"control.safetensors": part("control")}
    if not model.sd_locked:
        files["unet.safetensors"] = part("unet")
    return files


def load_model(model: ControlledUNet, path: Path) -> None:
    """Loads the weights that `model_files` wrote, every one of them, in place.

    Raises CheckpointError when names or shapes differ from the model's.
    """
    for name in model_files(model):
        part = name.removesuffix(".safetensors")
        module, file = getattr(model, part), path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the checkpoint was made with another model.sd_locked")
        saved = load_file(file)
        own = {prefixed(f"{part}.{key}"): tensor for key, tensor in module.state_dict().items()}
        for key in sorted(own.keys() ^ saved.keys()):
            where = "the model has, the file lacks" if key in own else "the file has, the model lacks"
            raise CheckpointError(f"{file} does not fit the model: {where} {key}")
        for key, tensor in own.items():
            if saved[key].shape != tensor.shape:
                shapes = f"{list(saved[key].shape)}; expected {list(tensor.shape)}"
                raise CheckpointError(f"{file} does not fit the model: {key} is {shapes}")
            tensor.copy_(saved[key])


def read_average(model: ControlledUNet, path: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint under the model's names."""
    saved = load_file(path / AVERAGE)
    own = {prefixed(name): name for name in trainable_tensors(model)}
    for key in sorted(own.keys() ^ saved.keys()):
        raise CheckpointError(f"{path / AVERAGE} does not fit the model, which trains other weights: {key}")
    return {own[key]: tensor for key, tensor in saved.items()}


@torch.no_grad()
def load_average(model: ControlledUNet, path: Path) -> None:
    """Puts the averaged weights of a checkpoint into the model, after `load_model`."""
    weights = trainable_tensors(model)
    for name, tensor in read_average(model, path).items():
        weights[name].copy_(tensor)

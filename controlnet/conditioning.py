"""The frozen parts around the U-Net: first stage (image <-> latent) and condition stage (captions -> context)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from controlnet import checkpoints
from controlnet.config import dtype, refuse_unknown
from controlnet.extras import require
from controlnet.model.layers import sinusoids

DDCONFIG = (
    "ch", "ch_mult", "num_res_blocks", "z_channels", "in_channels", "out_ch", "attn_resolutions", "resolution",
    "double_z", "dropout",
)  # fmt: skip


TIME_ID_CHANNELS = 256  # of the sinusoids of each of Stable Diffusion XL's six time ids


class Conditioning(nn.Module):
    """First stage and condition stage, frozen: what turns images and captions into what the U-Net is trained on.

        latents = scale_factor * first_stage.encode(images);  context = cond_stage(tokenize(captions))

    A condition stage with a pooled vector, as Stable Diffusion XL's, gives the U-Net a vector y beside the context:

        context, pooled = cond_stage(tokenize(captions));  y = [pooled, sinusoids(time_ids, 256)]

    Args:
        first_stage: `AutoencoderKL` or `SpaceToDepth`.
        cond_stage: `CLIPTextEncoder`, `WordEmbedder` or `sdxl.TextEncoders`.
        scale_factor: brings the latents to about unit variance.

    Each stage computes in its own precision, whatever autocast says, and answers in float32. There are no gradients,
    and `train()` leaves it in evaluation mode. `tokenize` is the condition stage's: captions -> int64 [N, T] (of two
    text encoders [N, 2, T]) on the CPU, a small object of its own, which workers of a data loader take along.
    """

    def __init__(self, first_stage: nn.Module, cond_stage: nn.Module, scale_factor: float = 1.0):
        super().__init__()
        self.first_stage = first_stage
        self.cond_stage = cond_stage
        self.scale_factor = scale_factor
        self.tokenize = cond_stage.tokenize
        self._no_caption: Tensor | None = None  # tokens of the empty caption, [1, ...], made when first asked for
        self.requires_grad_(False)
        self.eval()

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return self.first_stage.factor

    @property
    def latent_channels(self) -> int:
        return self.first_stage.latent_channels

    @property
    def context_dim(self) -> int:
        return self.cond_stage.context_dim

    @property
    def vector_channels(self) -> int | None:
        """Channels of y, 2816 for Stable Diffusion XL; None for a condition stage without a pooled vector."""
        pooled = getattr(self.cond_stage, "pooled_dim", None)
        return None if pooled is None else pooled + 6 * TIME_ID_CHANNELS

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.parameters()), torch.device("cpu"))

    def train(self, mode: bool = True) -> "Conditioning":
        return super().train(False)

    @torch.no_grad()
    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents, float32 [N, latent_channels, H / factor, W / factor].

        Args:
            images: float [N, 3, H, W] in [-1, 1], H and W multiples of `factor`.
            generator: draws from the VAE's posterior; on any device. Not used by a first stage without one.
        Raises ValueError for another shape, dtype, or size.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images is {images.dtype} {list(images.shape)}; expected floating point [N, 3, H, W] in [-1, 1]"
            )
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(
                f"images is {images.shape[2]}x{images.shape[3]}; expected multiples of the first stage's {self.factor}"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.first_stage.encode(images, generator).float() * self.scale_factor

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Images, float32 [N, 3, H, W] clamped to [-1, 1], of scaled latents [N, latent_channels, h, w]."""
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents is {list(latents.shape)}; expected [N, {self.latent_channels}, h, w]")
        with torch.autocast(latents.device.type, enabled=False):
            return self.first_stage.decode(latents.float() / self.scale_factor).float().clamp(-1, 1)

    def context(self, captions: Sequence[str] | Tensor) -> Tensor:
        """The context, float32 [N, T, context_dim], of captions or of their tokens, int64.

        The empty caption is the unconditional one.
        """
        return self._text(captions)[0]

    def condition(self, captions: Sequence[str] | Tensor, time_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context as `context` gives it, and y, float32 [N, vector_channels]; None for a stage without one.

        Args:
            time_ids: [N, 6], height and width of the original image, top and left of the crop, height and width of the
                result. Not read by a stage without a pooled vector.
        """
        context, pooled = self._text(captions)
        return context, None if pooled is None else self._vector(pooled, time_ids)

    @torch.no_grad()
    def _text(self, captions: Sequence[str] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Context and pooled vector (None for a stage without one), float32."""
        if isinstance(captions, str):
            raise TypeError(f"captions is the one text {captions!r}; expected a list of texts")
        tokens = captions if isinstance(captions, Tensor) else self.tokenize(list(captions))
        with torch.autocast(self.device.type, enabled=False):
            answer = self.cond_stage(_sent(tokens, self.device))
        if isinstance(answer, Tensor):
            return answer.float(), None
        context, pooled = answer
        return context.float(), pooled.float()

    def _vector(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        if time_ids.shape != (len(pooled), 6):
            raise ValueError(f"time_ids is {list(time_ids.shape)}; expected [{len(pooled)}, 6]")
        return torch.cat([pooled, sinusoids(_sent(time_ids, self.device), TIME_ID_CHANNELS)], dim=1)

    def batch_latents(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> Tensor:
        """The latents of a batch of images, or of a cached one; nothing waits for the device.

        Args:
            batch: "images" as `latents` takes them, or "moments", [N, 2, C, h, w] mean and standard deviation of the
                posterior, or [N, 1, C, h, w] of a first stage without one, before the scale factor.
        """
        if "images" in batch:
            return self.latents(_sent(batch["images"], self.device), generator)
        mean, *deviation = _sent(batch["moments"], self.device).float().unbind(1)
        for std in deviation:
            mean = mean + std * _noise_like(mean, generator)
        return mean * self.scale_factor

    def batch_context(self, batch: Mapping[str, Any], dropped: Tensor) -> Tensor:
        """The context of a batch; nothing waits for the device.

        Args:
            batch: "states" [N, T, D] and "no_caption" [T, D], cached; or "tokens", int64 [N, T] or [N, 2, T]; or
                "captions".
            dropped: bool [N] on the CPU; these captions are replaced by the empty one.
        """
        return self.batch_condition(batch, dropped)[0]

    def batch_condition(self, batch: Mapping[str, Any], dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context of a batch and its vector y; nothing waits for the device.

        A dropped caption takes its pooled vector with it, and leaves the time ids as they are.

        Args:
            batch: as `batch_context`, with "time_ids" [N, 6] for a stage that has a pooled vector.
            dropped: as `batch_context`.
        """
        if "states" in batch:
            states, empty = (_sent(batch[name], self.device).float() for name in ("states", "no_caption"))
            return torch.where(_sent(dropped, self.device)[:, None, None], empty, states), None
        tokens = batch["tokens"] if "tokens" in batch else self.tokenize(batch["captions"])
        if self._no_caption is None:
            self._no_caption = self.tokenize([""])
        tokens = torch.where(dropped.view(-1, *(1,) * (tokens.dim() - 1)), self._no_caption, tokens)
        if self.vector_channels is None:
            return self.context(tokens), None
        if "time_ids" not in batch:
            raise ValueError(f"the batch has {', '.join(batch)}; expected time_ids, [N, 6], too")
        return self.condition(tokens, batch["time_ids"])


def _noise_like(mean: Tensor, generator: torch.Generator | None) -> Tensor:
    device = mean.device if generator is None else generator.device
    return torch.randn(mean.shape, generator=generator, device=device).to(mean.device, non_blocking=True)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for the copy: from pinned memory, which the copy keeps alive."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class SpaceToDepth(nn.Module):
    """A first stage without weights: each square of factor x factor pixels becomes 3 * factor^2 channels.

    Lossless: decode(encode(x)) is x bit for bit, also through `Conditioning` when its scale_factor is a power of two.
    """

    def __init__(self, factor: int):
        super().__init__()
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor is {factor!r}; expected a positive integer")
        self.factor = factor
        self.latent_channels = 3 * factor**2

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return nn.functional.pixel_unshuffle(images, self.factor)

    def moments(self, images: Tensor) -> Tensor:
        """The latents as [N, 1, C, h, w]: there is no posterior, and so no standard deviation."""
        return self.encode(images).unsqueeze(1)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(latents, self.factor)


class AutoencoderKL(nn.Module):
    """The variational autoencoder of Stable Diffusion, by diffusers.

    It encodes in `precision` and always decodes in float32: in bf16 the pictures lose levels of brightness, and in fp16
    the decoder's activations leave the range of the type, which gives black pictures or NaN.

    Args:
        from_pretrained: a diffusers folder (of the VAE, or of a pipeline, whose `vae` is taken); or a file
            (.safetensors, .bin, .ckpt) with the VAE's weights in diffusers' or the original's layout, or a whole Stable
            Diffusion checkpoint (`first_stage_model.*`). None leaves random weights.
        ddconfig: architecture, by the original's names: ch, ch_mult, num_res_blocks, z_channels, in_channels, out_ch,
            and attn_resolutions, which must be empty. Not read for a folder, which has its own. `resolution` (any size
            works), `double_z` (the encoder always gives mean and variance) and `dropout` (it is never trained) have
            no effect.
        embed_dim: channels of the latent.
        precision: of encoding: "fp32", "fp16" or "bf16" (and their usual spellings). Stable Diffusion's VAE overflows
            in fp16.
    Raises ImportError without diffusers; CheckpointError or FileNotFoundError for the weights; ValueError for an
        architecture with attention outside the middle block.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        ddconfig: Mapping[str, Any] | None = None,
        embed_dim: int = 4,
        precision: Any = "fp32",
    ):
        super().__init__()
        require("diffusers", extra="diffusers", wanted_by="it has the VAE of Stable Diffusion")
        import diffusers

        folder = _model_folder(from_pretrained, "vae")
        if folder is not None:
            self.vae = diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True)
        else:
            self.vae = diffusers.AutoencoderKL(**_vae_architecture(ddconfig or {}, embed_dim))
            if from_pretrained is not None:
                self.load(checkpoints.part_tensors(from_pretrained, "first_stage"), from_pretrained)
        self.vae.requires_grad_(False).eval()
        for part in (self.vae.encoder, self.vae.quant_conv):
            if part is not None:
                part.to(dtype(precision, "precision"))
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_channels = self.vae.config.latent_channels

    def load(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Takes the weights, under diffusers' names; `origin` names the file in errors."""
        checkpoints.fill(self.vae, tensors, origin, lambda name: False)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw from the posterior: mean + std * noise."""
        mean, std = self.moments(images).unbind(1)
        return mean + std * _noise_like(mean, generator)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the posterior, float32 [N, 2, C, h, w]."""
        posterior = self.vae.encode(images.to(self.vae.encoder.conv_in.weight.dtype)).latent_dist
        return torch.stack([posterior.mean.float(), posterior.std.float()], 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.float()).sample


class CLIPTextEncoder(nn.Module):
    """The CLIP text encoder of Stable Diffusion, by transformers; read from local files only.

    Args:
        version: a folder with a CLIP text model and its tokenizer, or a pipeline folder with `text_encoder` and
            `tokenizer`; or the name of a model that transformers has in its local cache.
        max_length: tokens of the context; longer captions are cut, shorter ones padded.
        layer: "last" for the last hidden state, as Stable Diffusion 1 uses it; "penultimate" for the one before it,
            through the final layer norm, as Stable Diffusion 2 uses OpenCLIP (not for diffusers' own folders of it,
            which leave the last layer out); "hidden" for the one of `layer_idx`, without norm.
        layer_idx: which hidden state, with layer "hidden".
        from_pretrained: a Stable Diffusion checkpoint whose `cond_stage_model.*` weights replace the folder's.
        precision: as `AutoencoderKL`.
    Raises ImportError without transformers; FileNotFoundError when nothing local has that name; ValueError.
    """

    # What a subclass for another encoder changes: transformers' class, a pipeline's subfolders, a checkpoint's part.
    model_class = "CLIPTextModel"
    subfolders = ("text_encoder", "tokenizer")
    part = "cond_stage"

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        max_length: int = 77,
        layer: str = "last",
        layer_idx: int | None = None,
        from_pretrained: str | None = None,
        precision: Any = "fp32",
    ):
        super().__init__()
        require("transformers", extra="diffusers", wanted_by="it has the CLIP text encoder")
        import transformers

        if layer not in ("last", "penultimate", "hidden") or (layer == "hidden") != (layer_idx is not None):
            raise ValueError(
                f"layer is {layer!r} with layer_idx {layer_idx!r}; expected 'last', 'penultimate', or 'hidden' with one"
            )
        model, tokenizer = version, version
        if (Path(version) / self.subfolders[0]).is_dir():
            model, tokenizer = (Path(version) / name for name in self.subfolders)
        try:
            words = transformers.CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
            self.encoder = getattr(transformers, self.model_class).from_pretrained(model, local_files_only=True)
        except OSError as error:
            raise FileNotFoundError(
                f"no CLIP text encoder at {version!r}: expected a folder with config.json, weights and tokenizer files,"
                " or a name in transformers' local cache; nothing is downloaded"
            ) from error
        self.context_dim = self.encoder.config.hidden_size
        positions = self.encoder.config.max_position_embeddings
        if not 1 <= max_length <= positions:
            raise ValueError(f"max_length is {max_length}; expected 1 to {positions}, the model's positions")
        self.max_length = max_length
        self.tokenize = ClipTokens(words, max_length)
        self.layer = {"last": None, "penultimate": -2, "hidden": layer_idx}[layer]
        self.normed = layer != "hidden"
        if from_pretrained is not None:
            self.load(checkpoints.part_tensors(from_pretrained, self.part), from_pretrained)
        self.encoder.to(dtype(precision, "precision")).requires_grad_(False).eval()

    def load(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Takes the weights of a checkpoint's part, whatever the version of transformers called them."""
        renamed = {_clip_name(name): tensor for name, tensor in tensors.items()}
        own = {_clip_name(name): name for name in self.encoder.state_dict()}
        found = {own[name]: tensor for name, tensor in renamed.items() if name in own}
        checkpoints.fill(self.encoder, found, origin, lambda name: name.endswith("position_ids"))

    def forward(self, captions: Sequence[str] | Tensor) -> Tensor:
        """The context [N, T, context_dim] of captions, or of their tokens int64 [N, T], T at most max_length."""
        tokens = captions if isinstance(captions, Tensor) else _sent(self.tokenize(captions), self.encoder.device)
        if self.layer is None:
            return self.encoder(input_ids=tokens).last_hidden_state
        hidden = self.encoder(input_ids=tokens, output_hidden_states=True).hidden_states[self.layer]
        return _final_norm(self.encoder)(hidden) if self.normed else hidden


class ClipTokens(NamedTuple):
    """Captions -> CLIP's token numbers, int64 [N, max_length], on the CPU."""

    tokenizer: Any
    max_length: int

    def __call__(self, captions: Sequence[str]) -> Tensor:
        options = {"truncation": True, "max_length": self.max_length, "padding": "max_length", "return_tensors": "pt"}
        return self.tokenizer(list(captions), **options)["input_ids"]


class WordEmbedder(nn.Module):
    """A condition stage of one table: each word of the caption is a vector, to which its position adds another.

    Words are runs of letters and digits, compared in lower case. A word outside the vocabulary is "unknown", the
    context is filled up with "nothing", and words beyond max_length are cut.

    Args:
        vocabulary: the words.
        dim: features of the context.
        max_length: words of the context.
        from_pretrained: a checkpoint whose `cond_stage_model.*` are the tables; without it they are random, the same
            ones each time.
        precision: as `AutoencoderKL`.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        dim: int,
        max_length: int,
        from_pretrained: str | None = None,
        precision: Any = "fp32",
    ):
        super().__init__()
        vocabulary = list(vocabulary)
        bad = [word for word in vocabulary if _words(word) != [word]]
        if not vocabulary or bad or len(set(vocabulary)) != len(vocabulary):
            raise ValueError(
                f"vocabulary has {len(vocabulary)} words, among them {bad[:3]}; expected different words, at least one,"
                " of lower-case letters and digits"
            )
        self.tokenize = WordTokens({word: i + 2 for i, word in enumerate(vocabulary)}, max_length)
        self.context_dim = dim
        self.max_length = max_length
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(len(vocabulary) + 2, dim)
        self.position = nn.Embedding(max_length, dim)
        for table, size in ((self.embedding, 1.0), (self.position, 0.5)):
            table.weight.data.copy_(size * torch.randn(table.weight.shape, generator=generator, device="cpu"))
        if from_pretrained is not None:
            self.load(checkpoints.part_tensors(from_pretrained, "cond_stage"), from_pretrained)
        self.to(dtype(precision, "precision"))

    def load(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Takes the tables `embedding.weight` and `position.weight`."""
        checkpoints.fill(self, tensors, origin, lambda name: False)

    def forward(self, captions: Sequence[str] | Tensor) -> Tensor:
        """The context [N, max_length, dim] of captions, or of their tokens int64 [N, max_length]."""
        device = self.embedding.weight.device
        tokens = captions if isinstance(captions, Tensor) else _sent(self.tokenize(captions), device)
        return self.embedding(tokens) + self.position.weight


class WordTokens(NamedTuple):
    """Captions -> word numbers, int64 [N, max_length], on the CPU: 0 is nothing, 1 an unknown word."""

    index: dict[str, int]
    max_length: int

    def __call__(self, captions: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(captions), self.max_length, dtype=torch.int64)
        for row, caption in zip(rows, captions, strict=True):
            numbers = [self.index.get(word, 1) for word in _words(caption)[: self.max_length]]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return rows


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _clip_name(name: str) -> str:
    """A CLIP tensor's name without the wrappers that differ between checkpoints and releases of transformers."""
    return name.removeprefix("transformer.").removeprefix("text_model.")


def _final_norm(encoder: nn.Module) -> nn.Module:
    return next(module for name, module in encoder.named_modules() if name.rpartition(".")[2] == "final_layer_norm")


def _model_folder(path: str | None, part: str) -> Path | None:
    """The folder with a config.json that a path stands for, itself or its subfolder `part`; None for a file."""
    if path is None or Path(path).is_file():
        return None
    for folder in (Path(path), Path(path) / part):
        if (folder / "config.json").is_file():
            return folder
    if Path(path).exists():
        raise FileNotFoundError(f"the folder {path} has no config.json, nor has its subfolder {part}")
    raise FileNotFoundError(f"nothing at {path}; expected a {part} file or folder")


def _vae_architecture(ddconfig: Mapping[str, Any], embed_dim: int) -> dict[str, Any]:
    """diffusers' arguments for an autoencoder described by the original's names."""
    for key in ddconfig:
        if key not in DDCONFIG:
            refuse_unknown("ddconfig", key, DDCONFIG)
    if ddconfig.get("attn_resolutions"):
        raise ValueError(
            f"ddconfig.attn_resolutions is {list(ddconfig['attn_resolutions'])}; expected none (attention is in the"
            " middle block alone)"
        )
    if ddconfig.get("z_channels", embed_dim) != embed_dim:
        raise ValueError(f"ddconfig.z_channels is {ddconfig['z_channels']}; expected embed_dim, {embed_dim}")
    mult = list(ddconfig.get("ch_mult", (1, 2, 4, 4)))
    return {
        "in_channels": ddconfig.get("in_channels", 3),
        "out_channels": ddconfig.get("out_ch", 3),
        "latent_channels": embed_dim,
        "block_out_channels": tuple(ddconfig.get("ch", 128) * m for m in mult),
        "layers_per_block": ddconfig.get("num_res_blocks", 2),
        "down_block_types": ("DownEncoderBlock2D",) * len(mult),
        "up_block_types": ("UpDecoderBlock2D",) * len(mult),
    }

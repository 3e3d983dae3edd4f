"""Condition stages, which encode captions to the context of the U-Net: CLIP, and a small word embedding."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from controlnet import checkpoints
from controlnet.common.extras import require
from controlnet.config import dtype


class CLIPTextEncoder(nn.Module):
    """The CLIP text encoder of Stable Diffusion, by transformers; read from local files only.

    Its attention is causal, which `cnkernels.attention` does not serve. It is PyTorch's scaled_dot_product_attention in
    `precision`, with the causal flag and no mask in memory. For ViT-L/14 it is 0.22 of 13.3 GFLOP of a caption.

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

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: nothing local has that name.
        ValueError: `layer` and `layer_idx` do not go together, or `max_length` exceeds the model's positions.
    """

    # A subclass for another encoder overrides: transformers' class, a pipeline's subfolders, a checkpoint's part.
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
            architecture = getattr(transformers, self.model_class)
            self.encoder = architecture.from_pretrained(model, local_files_only=True, attn_implementation="sdpa")
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
        """Loads the weights of a checkpoint's part, under the names of any release of transformers."""
        renamed = {_clip_name(name): tensor for name, tensor in tensors.items()}
        own = {_clip_name(name): name for name in self.encoder.state_dict()}
        found = {own[name]: tensor for name, tensor in renamed.items() if name in own}
        checkpoints.fill(self.encoder, found, origin, lambda name: name.endswith("position_ids"))

    def forward(self, captions: Sequence[str] | Tensor) -> Tensor:
        """The context [N, T, context_dim] of captions, or of their tokens int64 [N, T], T at most max_length."""
        tokens = captions if isinstance(captions, Tensor) else to_device(self.tokenize(captions), self.encoder.device)
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
    """A small condition stage: the sum of a word embedding and a position embedding.

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
        tokens = captions if isinstance(captions, Tensor) else to_device(self.tokenize(captions), device)
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
    """Strips the prefixes of a CLIP tensor's name that differ between checkpoints and releases of transformers."""
    return name.removeprefix("transformer.").removeprefix("text_model.")


def _final_norm(encoder: nn.Module) -> nn.Module:
    return next(module for name, module in encoder.named_modules() if name.rpartition(".")[2] == "final_layer_norm")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting: through pinned memory, which the copy keeps alive."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

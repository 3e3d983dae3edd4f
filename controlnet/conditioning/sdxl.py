"""Stable Diffusion XL's condition stage: the joined states of two CLIP text encoders, and a pooled state."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from controlnet import checkpoints
from controlnet.conditioning.text import CLIPTextEncoder, ClipTokens, to_device

FIRST, SECOND = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"


class ProjectedCLIP(CLIPTextEncoder):
    """Stable Diffusion XL's second text encoder, OpenCLIP's ViT-bigG, which also returns a pooled state."""

    model_class = "CLIPTextModelWithProjection"
    subfolders = ("text_encoder_2", "tokenizer_2")
    part = "cond_stage_2"

    @property
    def pooled_dim(self) -> int:
        return self.encoder.config.projection_dim

    def forward(self, captions: Sequence[str] | Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns the states [N, T, context_dim] of `layer_idx`, without norm, and the pooled state [N, pooled_dim]."""
        tokens = captions if isinstance(captions, Tensor) else to_device(self.tokenize(captions), self.encoder.device)
        output = self.encoder(input_ids=tokens, output_hidden_states=True)
        return output.hidden_states[self.layer], output.text_embeds


class TextEncoders(nn.Module):
    """Both text encoders of Stable Diffusion XL, by transformers; read from local files only.

        context = [penultimate states of the first, of the second];  pooled = projection of the second

    The states are taken without the final norm. The empty caption, which a dropped caption and a negative prompt that
    is not given are, has a context and a pooled vector of zeros: the base model was trained and is sampled so
    (diffusers: `force_zeros_for_empty_prompt`).

    Args:
        version: a pipeline's folder with `text_encoder`, `tokenizer`, `text_encoder_2` and `tokenizer_2`; or of the
            first encoder what `CLIPTextEncoder` takes.
        version_2: of the second encoder a folder with a CLIP text model with projection and its tokenizer, or a name in
            transformers' local cache; by default the pipeline's, or OpenCLIP's ViT-bigG in the cache.
        max_length: tokens of the context; longer captions are cut, shorter ones padded.
        from_pretrained: a Stable Diffusion XL checkpoint whose `conditioner.embedders.*` replace the folders' weights.
        zeros_for_empty: False encodes the empty caption as any other.
        precision: as `AutoencoderKL`.

    Raises: as `CLIPTextEncoder`.
    """

    parts = ("cond_stage", "cond_stage_2")  # of a checkpoint, what `load` takes

    def __init__(
        self,
        version: str = FIRST,
        version_2: str | None = None,
        max_length: int = 77,
        from_pretrained: str | None = None,
        zeros_for_empty: bool = True,
        precision: Any = "fp32",
    ):
        super().__init__()
        if version_2 is None:
            version_2 = version if (Path(version) / ProjectedCLIP.subfolders[0]).is_dir() else SECOND
        common = {"max_length": max_length, "layer": "hidden", "layer_idx": -2, "precision": precision}
        self.first = CLIPTextEncoder(version, **common)
        self.second = ProjectedCLIP(version_2, **common)
        self.context_dim = self.first.context_dim + self.second.context_dim
        self.pooled_dim = self.second.pooled_dim
        self.max_length = max_length
        self.tokenize = TwoTokens(self.first.tokenize, self.second.tokenize)
        self.zeros_for_empty = zeros_for_empty
        self.register_buffer("_empty", self.tokenize([""]), persistent=False)  # [1, 2, T]
        if from_pretrained is not None:
            for part in self.parts:
                self.load(checkpoints.part_tensors(from_pretrained, part), from_pretrained)

    def load(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Takes one encoder's weights, the second's if there is a projection; `origin` names the file in errors."""
        (self.second if "text_projection.weight" in tensors else self.first).load(tensors, origin)

    def forward(self, captions: Sequence[str] | Tensor) -> tuple[Tensor, Tensor]:
        """Context [N, T, context_dim] and pooled vector [N, pooled_dim] of captions, or of their tokens [N, 2, T]."""
        tokens = captions if isinstance(captions, Tensor) else to_device(self.tokenize(captions), self._empty.device)
        if tokens.dim() != 3 or tokens.shape[1] != 2:
            raise ValueError(f"tokens is {list(tokens.shape)}; expected [N, 2, T], of both tokenizers")
        states = self.first(tokens[:, 0])
        more, pooled = self.second(tokens[:, 1])
        context = torch.cat([states, more], dim=2)
        if not self.zeros_for_empty:
            return context, pooled
        empty = (tokens == self._empty).flatten(1).all(1)  # [N]
        return context.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)


class TwoTokens(NamedTuple):
    """Captions -> the token numbers of both tokenizers, int64 [N, 2, max_length], on the CPU."""

    first: ClipTokens
    second: ClipTokens

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.stack([self.first(captions), self.second(captions)], dim=1)

"""`Conditioning`: computes the U-Net's latents and context with the first stage and the condition stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from controlnet.conditioning.first_stage import noise_like
from controlnet.conditioning.text import to_device
from controlnet.model.layers import sinusoids

TIME_ID_CHANNELS = 256  # of the sinusoids of each of Stable Diffusion XL's six time ids


class Conditioning(nn.Module):
    """Encodes images to latents and captions to contexts, with a frozen first stage and condition stage.

        latents = scale_factor * first_stage.encode(images);  context = cond_stage(tokenize(captions))

    A condition stage with a pooled vector, as Stable Diffusion XL's, gives the U-Net a vector y beside the context:

        context, pooled = cond_stage(tokenize(captions));  y = [pooled, sinusoids(time_ids, 256)]

    Args:
        first_stage: `AutoencoderKL` or `SpaceToDepth`.
        cond_stage: `CLIPTextEncoder`, `WordEmbedder` or `sdxl.TextEncoders`.
        scale_factor: brings the latents to about unit variance.

    Each stage computes in its own precision, independent of autocast, and returns float32. There are no gradients,
    and `train()` leaves it in evaluation mode. `tokenize` is the condition stage's: captions -> int64 [N, T] (of two
    text encoders [N, 2, T]) on the CPU, a small object of its own, which workers of a data loader take along.
    """

    def __init__(self, first_stage: nn.Module, cond_stage: nn.Module, scale_factor: float = 1.0):
        super().__init__()
        self.first_stage = first_stage
        self.cond_stage = cond_stage
        self.scale_factor = scale_factor
        self.tokenize = cond_stage.tokenize
        self._no_caption: Tensor | None = None  # tokens of the empty caption, [1, ...], made at first use
        self.requires_grad_(False)
        self.eval()

    @property
    def factor(self) -> int:
        """The image's side divided by the latent's."""
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

        Raises:
            ValueError: another shape, dtype, or size.
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
        return self.text(captions)[0]

    def condition(self, captions: Sequence[str] | Tensor, time_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context as `context` gives it, and y, float32 [N, vector_channels]; None for a stage without one.

        Args:
            time_ids: [N, 6], height and width of the original image, top and left of the crop, height and width of the
                result. Not read by a stage without a pooled vector.
        """
        context, pooled = self.text(captions)
        return context, None if pooled is None else self._vector(pooled, time_ids)

    @torch.no_grad()
    def text(self, captions: Sequence[str] | Tensor) -> tuple[Tensor, Tensor | None]:
        """The context as `context` gives it, and the pooled vector, float32 [N, pooled channels]; None for a stage
        without one."""
        if isinstance(captions, str):
            raise TypeError(f"captions is the one text {captions!r}; expected a list of texts")
        tokens = captions if isinstance(captions, Tensor) else self.tokenize(list(captions))
        with torch.autocast(self.device.type, enabled=False):
            answer = self.cond_stage(to_device(tokens, self.device))
        if isinstance(answer, Tensor):
            return answer.float(), None
        context, pooled = answer
        return context.float(), pooled.float()

    def _vector(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        if time_ids.shape != (len(pooled), 6):
            raise ValueError(f"time_ids is {list(time_ids.shape)}; expected [{len(pooled)}, 6]")
        return torch.cat([pooled, sinusoids(to_device(time_ids, self.device), TIME_ID_CHANNELS)], dim=1)

    def batch_latents(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> Tensor:
        """The latents of a batch of images, or of a cached one; nothing waits for the device.

        Args:
            batch: "images" as `latents` takes them, or "moments", [N, 2, C, h, w] mean and standard deviation of the
                posterior, or [N, 1, C, h, w] of a first stage without one, before the scale factor.
        """
        if "images" in batch:
            return self.latents(to_device(batch["images"], self.device), generator)
        mean, *deviation = to_device(batch["moments"], self.device).float().unbind(1)
        for std in deviation:
            mean = mean + std * noise_like(mean, generator)
        return mean * self.scale_factor

    def batch_context(self, batch: Mapping[str, Any], dropped: Tensor) -> Tensor:
        """The context of a batch; nothing waits for the device.

        Args:
            batch: "states" [N, T, D] and "no_caption" [1, T, D], cached; or "tokens", int64 [N, T] or [N, 2, T]; or
                "captions".
            dropped: bool [N] on the CPU; these captions are replaced by the empty one.
        """
        return self.batch_condition(batch, dropped)[0]

    def batch_condition(self, batch: Mapping[str, Any], dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context of a batch and its vector y; nothing waits for the device.

        A dropped caption takes its pooled vector with it, and leaves the time ids as they are.

        Args:
            batch: as `batch_context`; for a stage that has a pooled vector with "time_ids" [N, 6], and beside states
                with "pooled" [N, P] and "no_pooled" [1, P].
            dropped: as `batch_context`.
        """
        if self.vector_channels is not None and "time_ids" not in batch:
            raise ValueError(f"the batch has {', '.join(batch)}; expected time_ids, [N, 6], too")
        if "states" in batch:
            context = self._dropped(batch, "states", "no_caption", dropped)
            if self.vector_channels is None:
                return context, None
            return context, self._vector(self._dropped(batch, "pooled", "no_pooled", dropped), batch["time_ids"])
        tokens = batch["tokens"] if "tokens" in batch else self.tokenize(batch["captions"])
        if self._no_caption is None:
            self._no_caption = self.tokenize([""])
        tokens = torch.where(dropped.view(-1, *(1,) * (tokens.dim() - 1)), self._no_caption, tokens)
        if self.vector_channels is None:
            return self.context(tokens), None
        return self.condition(tokens, batch["time_ids"])

    def _dropped(self, batch: Mapping[str, Any], name: str, empty: str, dropped: Tensor) -> Tensor:
        """A cached tensor of a batch, float32 [N, ...], with the empty caption's rows where captions are dropped."""
        rows, instead, drop = (to_device(tensor, self.device) for tensor in (batch[name], batch[empty], dropped))
        return torch.where(drop.view(-1, *(1,) * (rows.dim() - 1)), instead, rows).float()

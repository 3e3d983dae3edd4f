"""The training loop: steps, what is reported of them, and how a run is saved and taken up.

A step is one update of the weights. It reads micro_batch_size * accumulation * ranks images, whatever the way they are
split; warm-up, logging, samples, checkpoints and max_steps count steps.
"""

import contextlib
import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from controlnet.config import ConfigError, dtype
from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule
from controlnet.training import checkpoint
from controlnet.training.distributed import Stopped, StopRequest, World
from controlnet.training.metrics import Reporter, control_sensitivity
from controlnet.training.optim import ExponentialAverage, LearningRate, build_optimizer
from controlnet.training.randomness import RandomStreams
from controlnet.training.validation import draw_grid

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

# The only buffers are the tables of the noise schedule, constants. PyTorch renames the argument that says so.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"
SENSITIVITY_SAMPLES = 4  # enough to see the metric move; a logged step costs two more forward passes of so many


def accumulation(micro: int, global_batch: int | None, accumulate: int, ranks: int) -> int:
    """Micro-batches in a step: global_batch / (micro * ranks), or `accumulate` when there is no global batch.

    Raises ConfigError when they do not divide, or both are given and differ.
    """
    for name, value in (("model.micro_batch_size", micro), ("trainer.accumulate_grad_batches", accumulate)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected 1 or more")
    if global_batch is None:
        return accumulate
    if global_batch < 1 or global_batch % (micro * ranks):
        raise ConfigError(
            f"model.global_batch_size is {global_batch}; expected a multiple of {micro * ranks} ="
            f" model.micro_batch_size {micro} x {ranks} ranks"
        )
    count = global_batch // (micro * ranks)
    if accumulate not in (1, count):
        raise ConfigError(
            f"trainer.accumulate_grad_batches is {accumulate} but model.global_batch_size {global_batch} ="
            f" {micro} x {ranks} ranks x {count}; leave one of them out"
        )
    return count


def run_folder(exp_manager: Mapping[str, Any]) -> Path:
    """Where a run keeps its metrics, samples and checkpoints."""
    if exp_manager["explicit_log_dir"]:
        return Path(exp_manager["explicit_log_dir"])
    return Path(exp_manager["exp_dir"] or "runs") / (exp_manager["name"] or "controlnet")


class Trainer:
    """The loop of one rank.

    Arguments:
        cfg: from `config.load`.
        world: this rank.
        model: ControlledUNet with float32 weights; the locked ones are stored in trainer.precision from here on.
        conditioning: `conditioning.Conditioning`, or anything with its methods.
        make_loader: position -> the loader that goes on there; None is the start. Each time it is iterated, a loader
            yields the batches left in an epoch, as many on every rank; it has `epoch` (of the next batch), `position`
            (after the batches handed out) and `drops` (reason -> shard -> count), as `data.ShardLoader`.
        stop: polled at the end of each step.
        streams: the random numbers of this rank; by default RandomStreams(model.seed, rank).
    Raises ConfigError for settings that contradict each other.
    """

    def __init__(
        self,
        cfg: "DictConfig",
        world: World,
        model: ControlledUNet,
        conditioning: Any,
        make_loader: Callable[[Any], Iterable[Mapping[str, Any]]],
        stop: StopRequest,
        streams: RandomStreams | None = None,
    ):
        self.cfg, self.world, self.stop = cfg, world, stop
        self.model, self.make_loader = model, make_loader
        self.folder = run_folder(cfg.exp_manager)
        batches = cfg.model.micro_batch_size, cfg.model.global_batch_size, cfg.trainer.accumulate_grad_batches
        self.accumulate = accumulation(*batches, world.size)
        self.max_steps, self.max_epochs = (
            n if n >= 0 else None for n in (cfg.trainer.max_steps, cfg.trainer.max_epochs)
        )
        if self.max_steps is None and self.max_epochs is None:
            raise ConfigError("trainer.max_steps and trainer.max_epochs are both unlimited; set one of them")
        self.learning_rate = LearningRate(cfg.optim, self.max_steps)
        self.streams = streams or RandomStreams(cfg.model.seed, world.rank, world.device)
        self.schedule = NoiseSchedule.from_config(cfg.model).to(world.device)
        self._place(dtype(cfg.trainer.precision))
        self.conditioning = conditioning.to(world.device)
        self.optimizer = build_optimizer(self.trainable, cfg.optim)
        ema = cfg.exp_manager.ema
        self.average = ExponentialAverage(model, ema.decay, ema.every_n_steps) if ema.enable else None
        self.step = self.images_seen = self.skipped = self.skipped_in_a_row = 0
        self.saved_step: int | None = None
        self.loader: Any = None

    def _place(self, dtype: torch.dtype) -> None:
        """Moves the model to its device, precision and memory format, and wraps the loss for compilation and DDP."""
        device, cfg = self.world.device, self.cfg.model
        self.model.to(device)
        for parameter in self.model.unet.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        if cfg.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.trainable = list(self.model.trainable_parameters())
        self.autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.loss = DiffusionLoss(self.model, self.schedule)
        if cfg.inductor:
            self.loss.compile()
        self.parallel: torch.nn.Module = self.loss
        if self.world.size > 1:
            self.parallel = DistributedDataParallel(
                self.loss,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=cfg.gradient_as_bucket_view,
                **{_SYNC_BUFFERS: False},
            )
        self.model.train()

    def fit(self) -> bool:
        """Trains until max_steps or max_epochs, or until a rank is asked to stop, and saves at the end either way.

        Returns whether it was stopped.
        """
        if self.loader is None:
            self.resume()
        self._batches = self._endless_batches()
        every = self.cfg.exp_manager.checkpoint_callback_params
        stopping = finished = False
        self._losses: list[Tensor] = []
        with Reporter(self.folder, self.world, self.cfg, self.step, self.images_seen) as self.reporter:
            while not (stopping or finished or self.step == self.max_steps):
                step, epoch = self.step, self.loader.epoch
                finished, stopping = self.train_step()
                if self.step == step:
                    continue
                if self._due(self.cfg.trainer.log_every_n_steps):
                    self._report()
                if not stopping and self._draws_now():
                    stopping = self._draw_samples()
                n = every.every_n_epochs
                if self._due(every.every_n_train_steps) or (n > 0 and self.loader.epoch // n > epoch // n):
                    self.save()
            self.save()
        return stopping

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _draws_now(self) -> bool:
        options = self.cfg.model.image_logger
        first = options.log_first_step and self.step == 1
        return options.max_images > 0 and not options.disabled and (first or self._due(options.batch_frequency))

    def _endless_batches(self) -> Iterator[Mapping[str, Any] | None]:
        """Batch after batch, epoch after epoch; None once max_epochs are over."""
        while self.max_epochs is None or self.loader.epoch < self.max_epochs:
            yield from self.loader
        while True:
            yield None

    def _inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """latents, hint, context, noise, timesteps of a batch: the arguments of DiffusionLoss."""
        images = batch["images"].to(self.world.device, non_blocking=True)
        hint = batch["hint"].to(self.world.device, non_blocking=True)
        latents = self.conditioning.latents(images, generator=self.streams.generator).float()
        captions = self.streams.drop_prompts(batch["captions"], self.cfg.model.text_embedding_dropout_rate)
        context = self.conditioning.context(captions)
        noise, timesteps = self.streams.noise_and_timesteps(latents, self.schedule.timesteps)
        if self.cfg.model.channels_last:
            latents, hint = (x.contiguous(memory_format=torch.channels_last) for x in (latents, hint))
        return latents, hint, context, noise, timesteps

    def train_step(self) -> tuple[bool, bool]:
        """One step: forward and backward over all micro-batches, agreement among the ranks, update.

        Returns (whether the data is over, whether any rank was asked to stop). When the loss or the gradient is not
        finite on any rank, all of them leave out the update, and the step does not count.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.world.device)
        keys: list[str] = []
        for i in range(self.accumulate):
            batch = next(self._batches)
            if batch is None:
                return True, False
            inputs = self._inputs(batch)
            # Gradients travel once a step, with its last micro-batch.
            hold = self.world.size > 1 and i < self.accumulate - 1
            with self.parallel.no_sync() if hold else contextlib.nullcontext():
                with self.autocast():
                    loss = self.parallel(*inputs) / self.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
            keys += batch["keys"]
        self.images_seen += len(keys) * self.world.size
        self._latest = batch, inputs

        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.trainable])
        loss_broke, gradient_broke = ~torch.isfinite(total), ~torch.isfinite(norm)
        any_loss, any_gradient, stopping = self.world.any(loss_broke, gradient_broke, self.stop.requested)
        if any_loss or any_gradient:
            self._skip(any_loss, bool(loss_broke), keys)
        else:
            self._update(total, norm)
        self.scaler.update()
        return False, stopping

    def _update(self, loss: Tensor, norm: Tensor) -> None:
        limit = self.cfg.trainer.gradient_clip_val
        if limit:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, limit, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.scaler.step(self.optimizer)
        self.step += 1
        self.skipped_in_a_row = 0
        if self.average is not None:
            self.average.update(self.step)
        self._losses.append(loss)
        self._norm = norm
        self.reporter.advance()

    def _skip(self, loss_broke: bool, own_loss_broke: bool, keys: list[str]) -> None:
        """Counts a step without update; raises FloatingPointError after trainer.max_skipped_steps in a row."""
        self.skipped += 1
        # An overflow that a smaller loss scale cures is how fp16 works; it says nothing against weights or data.
        if not loss_broke and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return
        self.skipped_in_a_row += 1
        record = {"after_step": self.step, "loss_is_finite": not own_loss_broke, "keys": keys}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"nonfinite-rank{self.world.rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.skipped_in_a_row >= self.cfg.trainer.max_skipped_steps:
            raise FloatingPointError(
                f"the loss or its gradient was not finite {self.skipped_in_a_row} times in a row at step {self.step};"
                f" nothing was saved since step {self.saved_step or 0}. The samples are named in"
                f" {self.folder}/nonfinite-rank*.jsonl; lower optim.lr, or use trainer.precision=bf16 or fp32"
            )

    def _report(self) -> None:
        """Writes a row of metrics, the loss and the sensitivity as means over the ranks."""
        latents, hint, context, noise, timesteps = (x[:SENSITIVITY_SAMPLES] for x in self._latest[1])
        with self.autocast():
            x_t = self.schedule.add_noise(latents, noise, timesteps)
            sensitivity = control_sensitivity(self.model, x_t, timesteps, context, hint)
        dropped = sum(count for of_shard in self.loader.drops.values() for count in of_shard.values())
        drops = torch.tensor(float(dropped), device=self.world.device)
        local = torch.stack([torch.stack(self._losses).mean(), sensitivity, drops])
        loss, sensitivity, drops = self.world.mean(local).tolist()
        self._losses.clear()
        row = {
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": self._norm.item(),
            "control_sensitivity": sensitivity,
            "epoch": self.loader.epoch,
            "skipped_steps": self.skipped,
            "dropped_samples": round(drops * self.world.size),
        }
        if self.scaler.is_enabled():
            row["loss_scale"] = self.scaler.get_scale()
        self.reporter.row(self.step, self.images_seen, row)

    def _draw_samples(self) -> bool:
        """Writes a grid of hints, reconstructions and samples, each rank drawing its share. Returns whether to stop."""
        options = self.cfg.model.image_logger
        averaged = self.average is not None and not self.cfg.exp_manager.ema.validate_original_weights
        weights = self.average.swapped_in() if averaged else contextlib.nullcontext()
        try:
            with self.reporter.pause(), weights, self.autocast():
                picture, problem = draw_grid(
                    self.model,
                    self.conditioning,
                    self.schedule,
                    self._latest[0],
                    self.world,
                    images=options.max_images,
                    steps=options.log_images_kwargs.ddim_steps,
                    eta=options.log_images_kwargs.ddim_eta,
                    guidance_scale=options.log_images_kwargs.unconditional_guidance_scale,
                    seed=self.cfg.model.seed,
                    stop=self.stop,
                )
        except Stopped:
            return True
        self.reporter.picture(self.step, picture, problem)
        return False

    def save(self) -> None:
        """Saves a checkpoint, unless it exists or checkpoints are switched off. Every rank must call it.

        Raises FloatingPointError instead of saving weights that are not finite.
        """
        manager = self.cfg.exp_manager
        if not manager.create_checkpoint_callback or self.step == self.saved_step:
            return
        if not bool(torch.stack(torch._foreach_norm(self.trainable)).isfinite().all()):
            raise FloatingPointError(
                f"the weights are not finite at step {self.step}; no checkpoint is made of them. Lower optim.lr"
            )
        with self.reporter.pause():
            ranks = self.world.gather(checkpoint.rank_state(self))
            self.world.on_first(lambda: checkpoint.save(self, ranks))
        self.saved_step = self.step

    def resume(self) -> None:
        """Takes up the checkpoint that the configuration names, if any, and opens the data where it stood."""
        folder = self.folder / checkpoint.CHECKPOINTS
        path = self.world.on_first(lambda: checkpoint.choose(folder, self.cfg))
        position = None
        if path is not None:
            position = checkpoint.load(self, path)
            self.saved_step = self.step
            if self.world.is_first:
                logger.info("resumed from %s: step %d, %d images seen", path, self.step, self.images_seen)
        self.loader = self.make_loader(position)

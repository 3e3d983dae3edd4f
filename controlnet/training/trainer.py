"""The training loop: steps, their reports, saving and resuming.

A step is one update of the weights. It reads micro_batch_size * accumulation * ranks images.
Warm-up, logging, samples, checkpoints and max_steps are counted in steps.

The host never waits for a step's result before it has handed the device the next one: whether the loss and the gradient
were finite is decided on the device, on all ranks alike, and read a step late (`agreement.py`). A step is counted when
that is read, so all that counts steps (learning rate, average, checkpoints) is what it would be with a wait.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnkernels import findings
from cnkernels.tune import first_call
from controlnet.config import ConfigError, dtype
from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule
from controlnet.training import checkpoint, compiling, optim, placement
from controlnet.training.agreement import Agreement
from controlnet.training.arithmetic import accumulation, due, run_folder
from controlnet.training.distributed import Stopped, StopRequest, World
from controlnet.training.metrics import Reporter
from controlnet.training.optim import ExponentialAverage, LearningRate
from controlnet.training.randomness import RandomStreams
from controlnet.training.sensitivity import Sensitivity
from controlnet.training.validation import Validation, draw_grid

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


class Trainer:
    """The loop of one rank.

    Args:
        cfg: from `config.load`.
        world: this rank.
        model: ControlledUNet with float32 weights; the locked ones are stored in trainer.precision from here on.
        conditioning: `conditioning.Conditioning`, or anything with its methods.
        make_loader: position -> the loader that goes on there; None is the start. Each time it is iterated, a loader
            yields the batches left in an epoch, as many on every rank; it has `epoch` (of the next batch), `position`
            (after the batches handed out) and `drops` (reason -> shard -> count), as `data.ShardLoader`.
        stop: polled at the end of each step.
        streams: the random numbers of this rank; by default RandomStreams(model.seed, rank).
        validation: measured every trainer.val_check_interval steps; None for none.

    Raises:
        ConfigError: settings that contradict each other.
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
        validation: Validation | None = None,
    ):
        self.cfg, self.world, self.stop = cfg, world, stop
        self.model, self.make_loader, self.validation = model, make_loader, validation
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
        self.optimizer = optim.build_optimizer(self.trainable, cfg.optim, world.size)
        ema = cfg.exp_manager.ema
        self.average = ExponentialAverage(model, ema.decay, ema.every_n_steps) if ema.enable else None
        self.step = self.images_seen = self.skipped = self.skipped_in_a_row = 0
        self.saved_step: int | None = None
        self.stopped = self.data_over = False
        self.agreement = Agreement(world)
        self.loader: Any = None
        self.reporter: Any = None
        self._batches: Iterator[Mapping[str, Any] | None] = iter(())
        self._pending: list[str] | None = None  # keys of the step that is not counted yet
        self._losses: list[Tensor] = []  # of the steps counted since the last row of metrics
        self._loss = self._norm = torch.zeros((), device=world.device)  # of the last step
        self._latest: tuple[Any, tuple[Tensor, ...]] = None, ()  # batch and inputs of the last micro-batch

    def _place(self, dtype: torch.dtype) -> None:
        """Moves the model to its device, precision and memory format, and wraps the loss for compilation and DDP."""
        device, cfg = self.world.device, self.cfg.model
        placement.place(self.model, device, dtype, cfg.channels_last)
        self.trainable = list(self.model.trainable_parameters())
        self.autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.loss = DiffusionLoss(self.model, self.schedule, cfg.min_snr_gamma)
        self.sensitivity = Sensitivity(self.model, self.schedule)
        if cfg.tune and self.world.is_first:
            first_call.at_first_call(self.loss)
        if cfg.inductor:
            compiling.compile_parts(self.loss, self.sensitivity, cudagraphs=cfg.inductor_cudagraphs)
        self.parallel = placement.parallel(self.loss, self.world, cfg.gradient_as_bucket_view)
        self.model.train()

    def fit(self) -> bool:
        """Trains until max_steps or max_epochs, or until a rank is asked to stop, and saves at the end either way.

        Returns:
            whether it was stopped.
        """
        if self.loader is None:
            self.resume()
        self._batches = self._endless_batches()
        self.stopped = self.data_over = False
        self.reporter = Reporter(self.folder, self.world, self.cfg, self.step, self.images_seen)
        with self.reporter, self.world.failing_together():
            if self.cfg.model.inductor and self.step != self.max_steps:
                self._compile()
            else:
                self._advance()
            if self.cfg.model.tune:
                findings.forget()  # the first rank has measured in the first step, and all read it
            while not self._over():
                self._advance()
            self.world.at("its last checkpoint")
            self.save(last=True)
        return self.stopped

    def _compile(self) -> None:
        """The first step of compiled parts, which takes minutes: a signal ends it, since all before it is saved."""
        with self.stop.nothing_to_save(), compiling.announced() if self.world.is_first else contextlib.nullcontext():
            self._advance()
            if self.cfg.trainer.control_sensitivity_every_n_steps > 0 and self._latest[1]:
                with self.autocast():  # else its compilation would hold up a later step, and a signal during it
                    self.sensitivity(*self._latest[1])

    def _over(self) -> bool:
        return self.stopped or self.data_over or self.step == self.max_steps

    def _advance(self) -> None:
        """One step and what is due after it."""
        if self._over():
            return
        epoch = self.loader.epoch
        self.data_over = not self.train_step()
        # A single rank sees a signal at once; several ranks agree on it with the flags of a step.
        alone = self.world.size == 1 and self.stop.requested
        self.stopped = self.stopped or alone
        if (self._over() or self._something_due(epoch)) and self._settle():
            self._duties(epoch)

    def _something_due(self, epoch: int) -> bool:
        """Whether a report, save or the like is due after the pending step; `epoch` is that of its first batch."""
        step = self.step + 1
        return step == self.max_steps or any(due(self.cfg, step, epoch, self.loader.epoch).values())

    def _duties(self, epoch: int) -> None:
        follows = due(self.cfg, self.step, epoch, self.loader.epoch)
        if follows["report"]:
            self._report()
        for name, work in (("validate", self._validate), ("draw", self._draw_samples)):
            if follows[name] and not self.stopped:
                try:
                    with self.reporter.pause():
                        work()
                except Stopped:
                    self.stopped = True
        if follows["save"]:
            self.save()

    def _endless_batches(self) -> Iterator[Mapping[str, Any] | None]:
        """Batch after batch, epoch after epoch; None once max_epochs are over."""
        ours = {"first_stage_key": "images", "cond_stage_key": "captions", "control_key": "hint"}
        names = {self.cfg.model[key]: name for key, name in ours.items()}  # a loader may use those of the configuration
        while self.max_epochs is None or self.loader.epoch < self.max_epochs:
            yield from ({names.get(name, name): value for name, value in batch.items()} for batch in self.loader)
        while True:
            yield None

    def _inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """latents, hint, context, noise, timesteps, and y where there is one: the arguments of DiffusionLoss."""
        latents = self.conditioning.batch_latents(batch, self.streams.generator)
        hint = batch["hint"].to(self.world.device, non_blocking=True)
        dropped = self.streams.dropped_prompts(len(batch["keys"]), self.cfg.model.text_embedding_dropout_rate)
        context, y = self.conditioning.batch_condition(batch, dropped)
        noise, timesteps = self.streams.noise_and_timesteps(latents, self.schedule.timesteps)
        if self.cfg.model.offset_noise:
            noise = noise + self.cfg.model.offset_noise * self.streams.offset(latents)
        if self.cfg.model.channels_last:
            latents, hint = (x.contiguous(memory_format=torch.channels_last) for x in (latents, hint))
        if self.cfg.model.inductor and self.cfg.data.train.get("buckets") is not None:
            compiling.mark_sizes(latents, hint, noise)
        return latents, hint, context, noise, timesteps, *(() if y is None else (y,))

    def train_step(self) -> bool:
        """Queues one step: forward and backward over all micro-batches, the ranks' agreement, the update.

        When the loss or the gradient is not finite on any rank, all of them leave out the update, and the step does not
        count; the host learns of it in the next step, or from `_settle`.

        Returns:
            whether there was data for it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.world.device)
        keys: list[str] = []
        for i in range(self.accumulate):
            self.world.at(f"step {self.step + 1}, its data")
            with self.reporter.waiting_for_data():
                batch = next(self._batches)
            if batch is None:
                return False
            self.world.at(f"step {self.step + 1}, its computation")
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
        self._settle()  # the step before: the device is busy with this one meanwhile
        found_inf = self.agreement.ask(total, norm, self.stop.requested)
        self._update(norm, found_inf)
        self._pending, self._loss, self._norm = keys, total, norm
        return True

    def _update(self, norm: Tensor, found_inf: Tensor) -> None:
        """Clips and updates, unless found_inf (0-d, on the device) is 1."""
        limit = self.cfg.trainer.gradient_clip_val
        if limit:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, limit, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        optim.update(self.optimizer, found_inf, lambda: self.agreement.read().broke)
        self.scaler.update()

    def _settle(self) -> bool:
        """Reads the verdict on the pending step and counts the step, or records that it was skipped.

        Returns:
            whether it counted.
        """
        if self._pending is None:
            return False
        keys, self._pending = self._pending, None
        verdict = self.agreement.read()
        self.stopped = self.stopped or verdict.stopping
        if verdict.broke:
            self._skip(verdict.loss_broke, verdict.own_loss_broke, keys)
            return False
        self.step += 1
        self.skipped_in_a_row = 0
        if self.average is not None:
            self.average.update(self.step)
        self._losses.append(self._loss)
        self.reporter.advance()
        return True

    def _skip(self, loss_broke: bool, own_loss_broke: bool, keys: list[str]) -> None:
        """Counts a step without update; raises FloatingPointError after trainer.max_skipped_steps in a row."""
        self.skipped += 1
        # Overflows in fp16 are expected until the loss scale fits; they are no sign of bad weights or data.
        if not loss_broke and self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return
        self.skipped_in_a_row += 1
        record = {"after_step": self.step, "loss_is_finite": not own_loss_broke, "keys": keys}
        self.reporter.record(f"nonfinite-rank{self.world.rank}.jsonl", json.dumps(record))
        if self.skipped_in_a_row >= self.cfg.trainer.max_skipped_steps:
            raise FloatingPointError(
                f"the loss or its gradient was not finite {self.skipped_in_a_row} times in a row at step {self.step};"
                f" nothing was saved since step {self.saved_step or 0}. The samples are named in"
                f" {self.folder}/nonfinite-rank*.jsonl; lower optim.lr, or use trainer.precision=bf16 or fp32"
            )

    def _report(self) -> None:
        """Writes a row of metrics, the loss and the sensitivity as means over the ranks."""
        dropped = sum(count for of_shard in self.loader.drops.values() for count in of_shard.values())
        local = {"loss": torch.stack(self._losses).mean(), "dropped_samples": torch.tensor(float(dropped))}
        every, before = (
            self.cfg.trainer.control_sensitivity_every_n_steps,
            self.step - self.cfg.trainer.log_every_n_steps,
        )
        if every > 0 and self.step // every > before // every:  # in the first row at or after its time
            with self.autocast():
                local["control_sensitivity"] = self.sensitivity(*self._latest[1])
        means = self.world.mean(torch.stack([value.to(self.world.device) for value in local.values()])).tolist()
        row = dict(zip(local, means, strict=True))
        self._losses.clear()
        row |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": self._norm.item(),
            "epoch": self.loader.epoch,
            "skipped_steps": self.skipped,
            "dropped_samples": round(row["dropped_samples"] * self.world.size),
        }
        if self.scaler.is_enabled():
            row["loss_scale"] = self.scaler.get_scale()
        self.reporter.row(self.step, self.images_seen, row)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model holds the weights for samples and validation: the average, if there is one."""
        averaged = self.average is not None and not self.cfg.exp_manager.ema.validate_original_weights
        return self.average.swapped_in() if averaged else contextlib.nullcontext()

    def _validate(self) -> None:
        if self.validation is None:
            return
        with self._averaged(), self.autocast():
            loss = self.validation.loss(self.model, self.conditioning, self.schedule, self.world, self.stop)
        self.reporter.value(self.step, "validation_loss", loss)

    def _draw_samples(self) -> None:
        """Writes a grid of hints, reconstructions and samples, each rank drawing its share."""
        options = self.cfg.model.image_logger
        with self._averaged(), self.autocast():
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
        self.reporter.picture(self.step, picture, problem)

    def state_dict(self) -> dict[str, Any]:
        """What all ranks share beside the weights: counts, optimizer, loss scale. Tensors are not copied."""
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "skipped": self.skipped,
            "trainable": placement.trainable_names(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average_updates": self.average.updates if self.average is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; the optimizer's settings stay those of the present configuration.

        Raises:
            CheckpointError: other weights were trained, or an average is missing.
        """
        own = placement.trainable_names(self.model)
        if state["trainable"] != own:
            raise checkpoint.CheckpointError(
                f"{len(state['trainable'])} weights were trained when it was made; expected the same {len(own)} as now"
                " (model.sd_locked, model.only_mid_control)"
            )
        if self.average is not None:
            if state["average_updates"] is None:
                raise checkpoint.CheckpointError("it holds no average; set exp_manager.ema.enable=False, or start anew")
            self.average.updates = state["average_updates"]
        optim.load_state(self.optimizer, state["optimizer"]["state"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.images_seen, self.skipped = (state[key] for key in ("step", "images_seen", "skipped"))

    def rank_state_dict(self) -> dict[str, Any]:
        """What differs from rank to rank: random generators and the position in the data."""
        device = self.world.device
        return {
            "global": checkpoint.random_state(device),
            "streams": self.streams.state_dict(),
            "position": self.loader.position,
        }

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Restores what `rank_state_dict` returned; returns the position in the data."""
        checkpoint.set_random_state(state["global"], self.world.device)
        self.streams.load_state_dict(state["streams"])
        return state["position"]

    def save(self, last: bool = False) -> None:
        """Saves a checkpoint, unless it exists or checkpoints are switched off. Every rank must call it.

        A disk that is full is a warning that names what is still there, and the run goes on, unless this is the last.

        Raises:
            FloatingPointError: the weights are not finite; they are not saved.
            OSError: with `last`, the disk does not take it.
        """
        manager = self.cfg.exp_manager
        if not manager.create_checkpoint_callback or self.step == self.saved_step:
            return
        if not bool(torch.stack(torch._foreach_norm(self.trainable)).isfinite().all()):
            raise FloatingPointError(
                f"the weights are not finite at step {self.step}; no checkpoint is made of them. Lower optim.lr"
            )
        with self.reporter.pause():
            optim.gather_state(self.optimizer)
            ranks = self.world.gather(self.rank_state_dict())
            problem = self.world.on_first(lambda: self._save(ranks))
        if problem is None:
            self.saved_step = self.step
        elif last:
            raise OSError(problem)
        elif self.world.is_first:
            logger.warning("%s; training goes on", problem)

    def _save(self, ranks: list[dict[str, Any]]) -> str | None:
        """Writes the checkpoint, on rank 0; returns what is wrong with the disk, or None."""
        folder, keep = self.folder / checkpoint.CHECKPOINTS, self.cfg.exp_manager.checkpoint_callback_params.save_top_k
        averages = self.average.averages if self.average is not None else None
        try:
            checkpoint.save(folder, self.model, averages, self.state_dict(), ranks, self.cfg)
            checkpoint.prune(folder, keep)
        except OSError as error:
            newest = checkpoint.newest_complete(folder)
            return f"step {self.step} was not saved: {error}. The newest checkpoint on disk: {newest or 'none'}"
        return None

    def resume(self) -> None:
        """Restores the checkpoint that the configuration names, if any, and opens the data at its position.

        Raises:
            CheckpointError: it is of another model or number of ranks, or damaged.
        """
        folder = self.folder / checkpoint.CHECKPOINTS
        path = self.world.on_first(lambda: checkpoint.choose(folder, self.cfg))
        position = None
        if path is not None:
            position = self.load(path)
            self.saved_step = self.step
            if self.world.is_first:
                logger.info("resumed from %s: step %d, %d images seen", path, self.step, self.images_seen)
        self.loader = self.make_loader(position)

    def load(self, path: Path) -> Any:
        """Restores the state that the checkpoint was saved in; returns the position in the data.

        With another number of ranks than the checkpoint's, allowed by exp_manager.resume_with_other_world_size, the
        random streams start afresh and the position is None.
        """
        ranks = checkpoint.ranks(path)
        if ranks != self.world.size and not self.cfg.exp_manager.resume_with_other_world_size:
            raise checkpoint.CheckpointError(
                f"{path} was saved by {ranks} ranks and {self.world.size} run now, which cannot go on with the same"
                " noise and data; start as many, or set exp_manager.resume_with_other_world_size=True"
            )
        with checkpoint.named(path):
            checkpoint.load_model(self.model, path)
            self.load_state_dict(checkpoint.read(path / "state.pt", self.world.device))
            if self.average is not None:
                self.average.load(checkpoint.read_average(self.model, path), self.average.updates)
            if ranks != self.world.size:
                return None
            own = checkpoint.read(path / f"rng-rank{self.world.rank}.pt", torch.device("cpu"))
            return self.load_rank_state_dict(own)

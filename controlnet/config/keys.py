"""Every key of a configuration with its type, range, default and effect. Arguments of the parts are in `stages.py`.

To add a key, add it to its section with its effect, and `python -m controlnet.config > docs/configuration.md`. A key
that is accepted and ignored is `silent`, with the reason; values that need more than a range have a rule in `rules.py`.
"""

from typing import Any

from controlnet.config.schema import Key, flag, integer, mapping, number, only, several, silent, text

STAGE = object()  # a node with a _target_, described in `stages.py`

_PLAIN_LOSS = "the loss is the mean squared error (model.min_snr_gamma weighs it)"
_ONE = "ranks are data-parallel: each holds the whole model"
_GRADIENT_BUCKETS = "gradients travel in the buckets of DistributedDataParallel"
_PICKLED = "a checkpoint is a folder named by its step"

_AUGMENTATIONS = {
    "resize_smallest_side": integer(None, "length that the smaller side is brought to", low=1, high=65536),
    "center_crop_h_w": Key((int, str, list), None, "height and width of the centre that is cut out", True, low=1),
    "random_crop_h_w": Key((int, str, list), None, "the same, anywhere in the picture", True, low=1),
    "horizontal_flip": Key((bool, float), None, "probability of a flip; true for 0.5", True, low=0, high=1),
}
_FILTERINGS = {
    "resolution": mapping(
        "which images are used by their size",
        {
            "method": text(None, "larger: both sides at least value; smaller: at most", choices=("larger", "smaller")),
            "value": integer(None, "in pixels", low=1, high=65536),
        },
    ),
    "estimated_portion": number(None, "share of the samples that filters leave; shortens the epoch", above=0, high=1),
}
_BUCKETS = {
    "sizes": Key((str, list), None, 'the sizes, as "height, width"', True),
    "area": integer(None, "or all sizes of at most so many pixels", low=1, high=2**26),
    "step": integer(64, "between two of those sizes", low=8, high=65536),
    "max_aspect": number(2, "of their longer side to the shorter", low=1, high=64),
    "random_crop": flag(False, "crop anywhere, not the centre"),
}
_PROFILE = {
    "enabled": flag(False, "true is an error: start the profiler from outside"),
    "start_step": silent(None, "of the profile"),
    "end_step": silent(None, "of the profile"),
    "ranks": silent(None, "of the profile"),
    "gen_shape": silent(None, "of the profile"),
    "trace": silent(None, "of the profile"),
}

# A set of shards: `data.train`, `data.validation`.
_SHARDS = {
    "dataset_path": Key(
        (str, list), [], "tar files, with braces or wildcards, or wdinfo .pkl files", items=text(..., "")
    ),
    "augmentations": _AUGMENTATIONS,
    "buckets": mapping("sizes of the crop, of which each image takes the one nearest to its shape", _BUCKETS),
    "hint": {
        "kind": text("picture", "what a hint is: a picture, or a map of class ids", choices=("picture", "labels")),
        "palette": text(None, "colours of class ids: ade20k, cocostuff, or a file"),
        "ground": text("white", "colour that transparent hints are laid on"),
    },
    "filterings": mapping("which samples are used", _FILTERINGS),
    "data_sharding": flag(True, "a rank has the same shards in every epoch; false deals them anew"),
    "extensions": {
        "image": text("jpg;jpeg;webp", "of the members that are images; alternatives as jpg;webp"),
        "caption": text("txt", "of the captions"),
        "hint": text("png;npy", "of the hints"),
    },
    "ignored_extensions": several([], "members that are not read", text(..., "")),
    "max_bad_fraction": number(0.05, "share of unusable samples that ends the run", low=0, high=1),
}

SCHEMA: dict[str, Any] = {
    "name": silent("controlnet", "for interpolation alone; exp_manager.name names the run"),
    "run": silent(None, "the launcher's own section"),
    "trainer": {
        "devices": Key(
            (int, str, list), None, "processes of each machine; null or auto takes what torchrun started", True
        ),
        "num_nodes": integer(1, "machines", low=1, high=65536),
        "accelerator": text("auto", "gpu, cpu, or a GPU where there is one", choices=("auto", "gpu", "cuda", "cpu")),
        "strategy": Key(
            (str, dict), "auto", "ranks are data-parallel: any DDP strategy is accepted, others are errors", True
        ),
        "precision": Key((int, str), "fp32", "fp32, fp16 (with a loss scaler) or bf16, in any usual spelling"),
        "logger": silent(False, "exp_manager decides what is logged"),
        "enable_checkpointing": silent(False, "exp_manager decides what is saved"),
        "use_distributed_sampler": silent(True, "shards are always split by rank and worker"),
        "max_epochs": integer(-1, "passes over the data; -1 is no limit", low=-1),
        "max_steps": integer(-1, "updates of the weights; -1 is no limit", low=-1),
        "max_time": text(None, "as exp_manager.max_time_per_run"),
        "log_every_n_steps": integer(10, "steps between two rows of metrics; 0 for none", low=0),
        "accumulate_grad_batches": integer(
            1, "micro-batches in a step, without model.global_batch_size", low=1, high=2**20
        ),
        "gradient_clip_val": number(None, "norm that gradients are clipped to", low=0),
        "max_skipped_steps": integer(10, "steps in a row without a finite loss that end the run", low=1),
        "deterministic": flag(False, "only deterministic algorithms of PyTorch"),
        "benchmark": flag(False, "let cuDNN choose convolutions by timing them"),
        "enable_model_summary": silent(True, "the parameter counts are always printed"),
        "enable_progress_bar": flag(True, "a bar on a terminal, lines in a log"),
        "limit_val_batches": integer(None, "batches of data.validation, of each rank; 0 or null for all", low=0),
        "val_check_interval": number(None, "steps between two losses of data.validation", low=0),
        "num_sanity_val_steps": silent(None, "the validation set is read once before the first step"),
        "control_sensitivity_every_n_steps": integer(100, "steps between two rows with control_sensitivity", low=0),
        "rank_timeout": number(1800.0, "seconds after which a rank gives up waiting for another one", above=0),
        "resume_from_checkpoint": text(None, "as exp_manager.resume_from_checkpoint"),
    },
    "exp_manager": {
        "explicit_log_dir": text(None, "folder of the run"),
        "exp_dir": text(None, "else the run is in exp_dir/name (default runs)"),
        "name": text(None, "see exp_dir (default controlnet)"),
        "create_wandb_logger": flag(False, "metrics go to Weights & Biases, too; offline without a login"),
        "wandb_logger_kwargs": Key((dict,), None, "arguments of wandb.init: project, name, entity, mode", True),
        "log_step_timing": flag(True, "rows of metrics have step_seconds and data_seconds"),
        "create_tensorboard_logger": flag(True, "event files beside metrics.jsonl"),
        "create_checkpoint_callback": flag(True, "whether checkpoints are saved"),
        "checkpoint_callback_params": {
            "save_top_k": integer(-1, "newest checkpoints that are kept; -1 for all", low=-1),
            "every_n_train_steps": integer(5000, "steps between two checkpoints; 0 for none", low=0),
            "every_n_epochs": integer(0, "epochs between two checkpoints; 0 for none", low=0),
            "monitor": text(None, "an error with save_top_k above 0: the newest are kept, not the best"),
            "filename": silent(None, _PICKLED),
        },
        "resume_if_exists": flag(False, "go on with the newest complete checkpoint of the run's folder"),
        "resume_ignore_no_checkpoint": flag(True, "start anew where resume_if_exists finds none"),
        "resume_from_checkpoint": text(None, "folder of the checkpoint to go on from"),
        "resume_with_other_world_size": flag(
            False, "go on with another number of ranks; the random streams start anew"
        ),
        "max_time_per_run": text(None, "DAYS:HOURS:MINUTES:SECONDS after which the run saves and ends"),
        "ema": {
            "enable": flag(False, "keep a running average of the trained weights"),
            "decay": number(0.9999, "of the average", low=0, below=1),
            "validate_original_weights": flag(False, "draw samples with the trained weights, not the average"),
            "every_n_steps": integer(1, "steps between two updates of the average", low=1),
            "cpu_offload": only(False, "the average stays beside the weights"),
        },
    },
    "model": {
        "_target_": text(
            "controlnet.model.controlled.ControlledUNet", "ControlLDM or MegatronControlNet, by any of its names"
        ),
        "precision": Key((int, str), None, "as trainer.precision", True),
        "micro_batch_size": integer(1, "images of one forward pass of one rank", low=1, high=2**20),
        "global_batch_size": integer(
            None, "images of a step over all ranks; the rest is accumulated", low=1, high=2**30
        ),
        # noise schedule
        "timesteps": integer(1000, "noise levels", low=1, high=100_000),
        "linear_start": number(0.00085, "first beta", above=0, below=1),
        "linear_end": number(0.0120, "last beta", above=0, below=1),
        "cosine_s": number(8e-3, "offset of the cosine schedule", above=0, below=1),
        "beta_schedule": text("linear", "kind of noise schedule", choices=("linear", "sqrt_linear", "sqrt", "cosine")),
        "given_betas": several(None, "betas that replace the schedule", number(..., "", above=0, below=1)),
        "parameterization": text("eps", "what the network predicts", choices=("eps", "v", "x0")),
        "num_timesteps_cond": only(1, "there is no schedule for the conditioning"),
        "v_posterior": only(0.0, "sampling uses DDIM, which has no posterior variance"),
        "original_elbo_weight": only(0.0, _PLAIN_LOSS),
        "l_simple_weight": only(1.0, _PLAIN_LOSS),
        "loss_type": only("l2", _PLAIN_LOSS),
        "offset_noise": number(
            0.0, "strength of training noise that is the same in all of a channel (0.05)", low=0, high=1
        ),
        "min_snr_gamma": number(
            None, "caps the weight of steps with little noise (usually 5); null weighs all alike", above=0
        ),
        "learn_logvar": only(False, _PLAIN_LOSS),
        "logvar_init": only(0.0, _PLAIN_LOSS),
        "clip_denoised": silent(True, "latents are never clipped"),
        "log_every_t": silent(200, "samples are drawn whole"),
        # batch entries, latents, text
        "first_stage_key": text(
            "images", "name of the images in a batch; an image extension (jpg) is that of the shards, too"
        ),
        "cond_stage_key": text("captions", "name of the captions in a batch; txt is the extension in the shards, too"),
        "control_key": text("hint", "name of the hints in a batch; an image extension is that of the shards, too"),
        "image_size": silent(64, "the network takes any size; data decides it"),
        "channels": integer(None, "channels of the latent; unet_config.in_channels, which it must equal", low=1),
        "scale_factor": number(0.18215, "brings latents to unit variance", above=0),
        "scale_by_std": only(False, "the latent scale is model.scale_factor"),
        "cond_stage_trainable": only(False, "the condition stage is frozen"),
        "cond_stage_forward": only(None, "the condition stage has one forward"),
        "conditioning_key": only("crossattn", "the text reaches the U-Net through cross-attention alone"),
        "concat_mode": silent(True, "nothing is concatenated to the latents"),
        "use_positional_encodings": only(False, "latents carry no positional encoding"),
        "text_embedding_dropout_rate": number(0.0, "share of captions replaced by the empty one", low=0, high=1),
        "monitor": silent(None, "of a callback; exp_manager.checkpoint_callback_params.monitor is the checkpoints'"),
        # what is trained, and how
        "sd_locked": flag(True, "freeze the decoder of the U-Net"),
        "only_mid_control": flag(False, "control the middle block alone"),
        "learning_rate": number(None, "optim.lr, where that is not given", low=0),
        "base_learning_rate": number(None, "as learning_rate", low=0),
        "use_ema": flag(False, "as exp_manager.ema.enable"),
        "fused_opt": only(True, "the optimizer is one fused kernel"),
        "channels_last": flag(False, "memory format of the model"),
        "tune": flag(False, "check and measure the kernels of a step at its start (cnkernels.tune); not with inductor"),
        "inductor": flag(False, "compile the step with TorchInductor"),
        "inductor_cudagraphs": flag(False, "with inductor: its mode reduce-overhead, which replays CUDA graphs"),
        "capture_cudagraph_iters": only(-1, "training captures no CUDA graph"),
        "gradient_as_bucket_view": flag(True, "gradients are views of the buckets of DistributedDataParallel"),
        "ddp_overlap": silent(True, _GRADIENT_BUCKETS),
        "seed": integer(1234, "of weights, data order and noise", low=0, high=2**62),
        "apex_transformer_log_level": silent(30, "Apex is not used"),
        "megatron_amp_O2": silent(False, "trained weights are float32, locked ones in trainer.precision, either way"),
        "tensor_model_parallel_size": only(1, _ONE),
        "pipeline_model_parallel_size": only(1, _ONE),
        "virtual_pipeline_model_parallel_size": only(None, _ONE, 1),
        "context_parallel_size": only(1, _ONE),
        "sequence_parallel": only(False, _ONE),
        "nsys_profile": mapping("profile of some steps", _PROFILE),
        # weights
        "ckpt_path": text(None, "file whose weights replace those of the parts"),
        "restore_from_path": text(
            None, "of NeMo's inference files: the checkpoint, for `python -m controlnet.generate`"
        ),
        "ignore_keys": only([], "weights are loaded whole; a missing tensor is an error"),
        "load_only_unet": flag(False, "take the U-Net alone from ckpt_path"),
        "load_unet": flag(True, "take the U-Net from ckpt_path"),
        "load_vae": flag(True, "take the first stage from ckpt_path"),
        "load_encoder": flag(True, "take the condition stage from ckpt_path"),
        "resume_from_checkpoint": text(None, "as exp_manager.resume_from_checkpoint"),
        # parts
        "unet_config": STAGE,
        "control_stage_config": STAGE,
        "first_stage_config": STAGE,
        "cond_stage_config": STAGE,
        "image_logger": {
            "batch_frequency": integer(1000, "steps between two grids of samples; 0 for none", low=-1),
            "max_images": integer(4, "samples of a grid", low=0, high=4096),
            "disabled": flag(False, "draw no samples"),
            "log_first_step": flag(False, "draw samples after the first step, too"),
            "log_images_kwargs": {
                "ddim_steps": integer(50, "steps of a sample", low=1, high=100_000),
                "ddim_eta": number(0.0, "0 deterministic, 1 as noisy as DDPM", low=0, high=1),
                "unconditional_guidance_scale": number(9.0, "strength of the caption"),
            },
        },
    },
    # `model.data` and `model.optim` (NeMo's place) are moved here.
    "data": {
        "num_workers": integer(0, "processes of a rank that decode; 0 decodes in the rank", low=0, high=4096),
        "synthetic_data": flag(False, "train on made-up samples of the crop's size, without shards"),
        "synthetic_data_length": integer(10000, "samples of them in an epoch", low=1),
        "train": _SHARDS,
        "validation": _SHARDS,
        "webdataset": {
            "infinite_sampler": flag(False, "draw shards with replacement"),
            "local_root_path": text(None, "folder that relative paths start from"),
            "chunk_size": integer(None, "samples in a shard, where no .pkl says it", low=1),
            "shuffle_buffer": integer(
                None, "samples to shuffle among (default chunk_size, or 1000)", low=0, high=10**8
            ),
            "use_webdataset": only(True, "shards are the one data format"),
            "verbose": silent(False, "drops are always counted and logged"),
        },
    },
    "optim": {
        "name": text(
            "fused_adam",
            "AdamW (adamw, and NeMo's fused_adam, megatron_fused_adam, distributed_fused_adam), adamw_8bit, or adam",
        ),
        "lr": number(1e-4, "learning rate after the warm-up", low=0),
        "weight_decay": number(0.0, "decoupled, as in AdamW", low=0),
        "betas": several([0.9, 0.999], "of Adam", number(..., "", low=0, below=1), length=2),
        "eps": number(1e-8, "of Adam", above=0),
        "zero": flag(False, "ZeRO-1: each rank keeps the optimizer's state of its share of the weights alone"),
        "overlap_grad_sync": silent(True, _GRADIENT_BUCKETS),
        "overlap_param_sync": silent(True, _GRADIENT_BUCKETS),
        "contiguous_grad_buffer": silent(True, _GRADIENT_BUCKETS),
        "contiguous_param_buffer": silent(True, _GRADIENT_BUCKETS),
        "bucket_cap_mb": silent(None, _GRADIENT_BUCKETS),
        "sched": {
            "name": text(
                "WarmupHoldPolicy", "constant (WarmupHoldPolicy, WarmupPolicy), cosine (CosineAnnealing) or linear"
            ),
            "warmup_steps": integer(0, "steps of the rising rate", low=0),
            "warmup_ratio": number(None, "the same as a share of all steps", low=0, high=1),
            "hold_steps": integer(None, "of a constant rate, which is held to the end; an error with a decay", low=0),
            "max_steps": integer(None, "where the decay ends (default trainer.max_steps)", low=1),
            "min_lr": number(0.0, "where the decay ends", low=0),
        },
    },
}

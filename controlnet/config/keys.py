"""Every key and target that a configuration may name: defaults, accepted values, and what has no effect here.

`SCHEMA` holds each key with its default. The default gives the type: a bool, int, float, str or list wants the same
(an int may stand for a float); `Maybe(kind)` is null or a value of that kind; a plain None takes anything, subtrees
included; `STAGE` is a node with a `_target_`, checked against the signature of the class that it names.
To add a key, add it to its section; when nothing reads it, add the reason to `NO_EFFECT`.
"""

from typing import Any, NamedTuple


class Maybe(NamedTuple):
    """A key that is null by default, or a value of `kind`."""

    kind: type


STAGE = object()

PRECISIONS = {
    "fp32": ("32", "32-true", "fp32", "float32"),
    "fp16": ("16", "16-mixed", "fp16", "float16"),
    "bf16": ("bf16", "bf16-mixed", "bfloat16"),
}

SCHEMA: dict[str, Any] = {
    "name": "controlnet",
    "run": None,
    "trainer": {
        "devices": None,
        "num_nodes": 1,
        "accelerator": "auto",
        "precision": "fp32",
        "logger": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": True,
        "max_epochs": -1,
        "max_steps": -1,
        "log_every_n_steps": 10,
        "accumulate_grad_batches": 1,
        "gradient_clip_val": Maybe(float),
        "max_skipped_steps": 10,
        "deterministic": False,
        "benchmark": False,
        "enable_model_summary": True,
        "enable_progress_bar": True,
        "limit_val_batches": None,
        "val_check_interval": None,
        "num_sanity_val_steps": None,
        "resume_from_checkpoint": Maybe(str),
    },
    "exp_manager": {
        "explicit_log_dir": Maybe(str),
        "exp_dir": Maybe(str),
        "name": Maybe(str),
        "create_wandb_logger": False,
        "wandb_logger_kwargs": None,
        "create_tensorboard_logger": True,
        "create_checkpoint_callback": True,
        "checkpoint_callback_params": {
            "save_top_k": -1,
            "every_n_train_steps": 5000,
            "every_n_epochs": 0,
            "monitor": Maybe(str),
            "filename": Maybe(str),
        },
        "resume_if_exists": False,
        "resume_ignore_no_checkpoint": True,
        "resume_from_checkpoint": Maybe(str),
        "resume_with_other_world_size": False,
        "ema": {
            "enable": False,
            "decay": 0.9999,
            "validate_original_weights": False,
            "every_n_steps": 1,
            "cpu_offload": False,
        },
    },
    "model": {
        "_target_": "controlnet.model.controlled.ControlledUNet",
        "precision": None,
        "micro_batch_size": 1,
        "global_batch_size": Maybe(int),
        # noise schedule
        "timesteps": 1000,
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "cosine_s": 8e-3,
        "beta_schedule": "linear",
        "given_betas": Maybe(list),
        "parameterization": "eps",
        "num_timesteps_cond": 1,
        "v_posterior": 0.0,
        "original_elbo_weight": 0.0,
        "l_simple_weight": 1.0,
        "loss_type": "l2",
        "learn_logvar": False,
        "logvar_init": 0.0,
        "clip_denoised": True,
        "log_every_t": 200,
        # batch members, latents, text
        "first_stage_key": "images",
        "cond_stage_key": "captions",
        "control_key": "hint",
        "image_size": 64,
        "channels": 4,
        "scale_factor": 0.18215,
        "scale_by_std": False,
        "cond_stage_trainable": False,
        "cond_stage_forward": None,
        "conditioning_key": "crossattn",
        "concat_mode": True,
        "use_positional_encodings": False,
        "text_embedding_dropout_rate": 0.0,
        "monitor": None,
        # what is trained, and how
        "sd_locked": True,
        "only_mid_control": False,
        "learning_rate": 1e-4,
        "use_ema": False,
        "fused_opt": True,
        "channels_last": False,
        "inductor": False,
        "inductor_cudagraphs": False,
        "capture_cudagraph_iters": -1,
        "gradient_as_bucket_view": True,
        "seed": 1234,
        "apex_transformer_log_level": None,
        "nsys_profile": None,
        # weights
        "ckpt_path": Maybe(str),
        "ignore_keys": [],
        "load_only_unet": False,
        "load_unet": True,
        "load_vae": True,
        "load_encoder": True,
        "resume_from_checkpoint": Maybe(str),
        # parts
        "unet_config": STAGE,
        "control_stage_config": STAGE,
        "first_stage_config": STAGE,
        "cond_stage_config": STAGE,
        "image_logger": {
            "batch_frequency": 1000,
            "max_images": 4,
            "disabled": False,
            "log_first_step": False,
            "log_images_kwargs": {
                "ddim_steps": 50,
                "ddim_eta": 0.0,
                "unconditional_guidance_scale": 9.0,
            },
        },
    },
    # `model.data` and `model.optim` (NeMo's place) are moved here.
    "data": {
        "num_workers": 0,
        "synthetic_data": False,
        "synthetic_data_length": 10000,
        "train": {
            "dataset_path": [],
            "augmentations": {
                "resize_smallest_side": Maybe(int),
                "center_crop_h_w": None,
                "random_crop_h_w": None,
                "horizontal_flip": None,
            },
            "buckets": None,
            "hint": {"kind": "picture", "palette": Maybe(str), "ground": "white"},
            "filterings": None,
            "data_sharding": True,
            "extensions": {"image": "jpg;jpeg;webp", "caption": "txt", "hint": "png;npy"},
            "ignored_extensions": [],
            "max_bad_fraction": 0.05,
        },
        "webdataset": {
            "infinite_sampler": False,
            "local_root_path": Maybe(str),
            "chunk_size": Maybe(int),
            "shuffle_buffer": Maybe(int),
            "use_webdataset": True,
            "verbose": False,
        },
    },
    "optim": {
        "name": "fused_adam",
        "lr": 1e-4,
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "sched": {
            "name": "WarmupHoldPolicy",
            "warmup_steps": 0,
            "warmup_ratio": Maybe(float),
            "hold_steps": Maybe(int),
            "max_steps": Maybe(int),
            "min_lr": 0.0,
        },
    },
}

CHOICES: dict[str, tuple[str, ...]] = {
    "trainer.accelerator": ("auto", "gpu", "cuda", "cpu"),
    "model._target_": ("controlnet.model.controlled.ControlledUNet",),
    "model.parameterization": ("eps", "v", "x0"),
    "data.train.hint.kind": ("picture", "labels"),
    "model.beta_schedule": ("linear", "sqrt_linear", "sqrt", "cosine"),
}

# Keys of other systems that change the result there and are not built here: only the value that asks for nothing.
ONLY: dict[str, tuple[Any, str]] = {
    "model.num_timesteps_cond": (1, "there is no schedule for the conditioning"),
    "model.conditioning_key": ("crossattn", "the text reaches the U-Net through cross-attention alone"),
    "model.cond_stage_trainable": (False, "the condition stage is frozen"),
    "model.cond_stage_forward": (None, "the condition stage has one forward"),
    "model.scale_by_std": (False, "the latent scale is model.scale_factor"),
    "model.use_positional_encodings": (False, "latents carry no positional encoding"),
    "model.learn_logvar": (False, "the loss is the plain mean squared error"),
    "model.logvar_init": (0.0, "the loss is the plain mean squared error"),
    "model.original_elbo_weight": (0.0, "the loss is the plain mean squared error"),
    "model.l_simple_weight": (1.0, "the loss is the plain mean squared error"),
    "model.loss_type": ("l2", "the loss is the plain mean squared error"),
    "model.ignore_keys": ([], "weights are loaded whole; a missing tensor is an error"),
    "data.synthetic_data": (False, "training reads shards; `make quickstart` makes some"),
    "data.webdataset.use_webdataset": (True, "shards are the one data format"),
}

# Accepted so that other systems' files run as they are; loading names those that a file sets, once.
NO_EFFECT: dict[str, str] = {
    "name": "only for interpolation; exp_manager.name names the run",
    "run": "the launcher's own section",
    "trainer.logger": "exp_manager decides what is logged",
    "trainer.enable_checkpointing": "exp_manager decides what is saved",
    "trainer.use_distributed_sampler": "shards are split by rank and worker",
    "trainer.enable_model_summary": "the parameter counts are always printed",
    "trainer.limit_val_batches": "there is no validation loop; image_logger draws samples",
    "trainer.val_check_interval": "there is no validation loop; image_logger draws samples",
    "trainer.num_sanity_val_steps": "there is no validation loop; image_logger draws samples",
    "exp_manager.create_wandb_logger": "metrics go to metrics.jsonl and TensorBoard",
    "exp_manager.wandb_logger_kwargs": "metrics go to metrics.jsonl and TensorBoard",
    "exp_manager.checkpoint_callback_params.monitor": "the newest checkpoints are kept, not the best",
    "exp_manager.checkpoint_callback_params.filename": "checkpoints are folders named by step",
    "exp_manager.ema.cpu_offload": "the average stays beside the weights",
    "model.precision": "trainer.precision decides",
    "model.first_stage_key": "a batch always calls it images; the extension is a key of data",
    "model.cond_stage_key": "a batch always calls it captions; the extension is a key of data",
    "model.control_key": "a batch always calls it hint; the extension is a key of data",
    "model.image_size": "the network takes any size; data decides it",
    "model.channels": "unet_config.in_channels decides",
    "model.concat_mode": "nothing is concatenated to the latents",
    "model.clip_denoised": "latents are never clipped",
    "model.log_every_t": "samples are drawn whole",
    "model.v_posterior": "sampling uses DDIM, which has no posterior variance",
    "model.monitor": "the newest checkpoints are kept, not the best",
    "model.learning_rate": "optim.lr decides",
    "model.use_ema": "exp_manager.ema decides",
    "model.inductor_cudagraphs": "compilation leaves CUDA graphs off",
    "model.capture_cudagraph_iters": "training captures no CUDA graph",
    "model.fused_opt": "the optimizer is always the fused one",
    "model.apex_transformer_log_level": "Apex is not used",
    "model.nsys_profile": "profilers are started from outside",
    "data.synthetic_data_length": "there is no synthetic data",
    "optim.sched.hold_steps": "the rate is held to the end",
    "data.webdataset.verbose": "drops are always counted and logged",
}

# The same for keys of the parts, dropped before the class is called unless its signature has them.
STAGE_NO_EFFECT: dict[str, dict[str, str]] = {
    "unet_config": {
        "image_size": "the network takes any size",
        "use_fp16": "trainer.precision decides",
        "unet_precision": "trainer.precision decides",
        "timesteps": "timestep embeddings are computed, not tabulated",
        "offload_to_cpu": "activation checkpoints stay on their device",
        "use_te_dpa": "Transformer Engine is not used",
        "spatial_transformer_attn_type": "attention is softmax attention",
        "use_fairscale_checkpoint": "use_checkpoint decides",
    },
    "first_stage_config": {
        "monitor": "the first stage is not trained",
        "lossconfig": "the first stage is not trained",
        "image_key": "the first stage is not trained",
        "colorize_nlabels": "the first stage is not trained",
    },
    "cond_stage_config": {
        "device": "the text encoder lives where the model lives",
        "freeze": "the condition stage is always frozen",
        "arch": "the folder's own configuration decides",
    },
}
STAGE_NO_EFFECT["control_stage_config"] = STAGE_NO_EFFECT["unet_config"]

# Keys of the parts that `build.py` reads; the class does not see them.
WEIGHT_KEYS: dict[str, tuple[str, ...]] = {
    "unet_config": ("from_pretrained", "from_NeMo"),
    "control_stage_config": ("from_pretrained_unet", "from_pretrained", "from_NeMo"),
}

STAGE_TARGETS: dict[str, tuple[str, ...]] = {
    "unet_config": ("controlnet.model.unet.UNet",),
    "control_stage_config": ("controlnet.model.controlnet.ControlNet",),
    "first_stage_config": ("controlnet.conditioning.AutoencoderKL", "controlnet.conditioning.SpaceToDepth"),
    "cond_stage_config": ("controlnet.conditioning.CLIPTextEncoder", "controlnet.conditioning.WordEmbedder"),
}

# Classes that take their arguments as the fields of another.
PARAMETERS: dict[str, str] = {
    "controlnet.model.unet.UNet": "controlnet.model.architecture.UNetArchitecture",
    "controlnet.model.controlnet.ControlNet": "controlnet.model.architecture.ControlNetArchitecture",
}

_NEMO = "nemo.collections.multimodal.models."
_NEMO_SD = "nemo.collections.multimodal.modules.stable_diffusion."
TARGETS: dict[str, str] = {
    "cldm.cldm.ControlLDM": "controlnet.model.controlled.ControlledUNet",
    "cldm.cldm.ControlledUnetModel": "controlnet.model.unet.UNet",
    "cldm.cldm.ControlNet": "controlnet.model.controlnet.ControlNet",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": "controlnet.model.unet.UNet",
    "ldm.models.autoencoder.AutoencoderKL": "controlnet.conditioning.AutoencoderKL",
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": "controlnet.conditioning.CLIPTextEncoder",
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": "controlnet.conditioning.CLIPTextEncoder",
    _NEMO_SD + "diffusionmodules.openaimodel.UNetModel": "controlnet.model.unet.UNet",
    _NEMO_SD + "encoders.modules.FrozenCLIPEmbedder": "controlnet.conditioning.CLIPTextEncoder",
    _NEMO_SD + "encoders.modules.FrozenOpenCLIPEmbedder": "controlnet.conditioning.CLIPTextEncoder",
    "diffusers.AutoencoderKL": "controlnet.conditioning.AutoencoderKL",
    "transformers.CLIPTextModel": "controlnet.conditioning.CLIPTextEncoder",
    # this package's own names before its modules moved into folders
    "controlnet.unet.UNet": "controlnet.model.unet.UNet",
    "controlnet.controlnet.ControlNet": "controlnet.model.controlnet.ControlNet",
    "controlnet.diffusion.ControlledUNet": "controlnet.model.controlled.ControlledUNet",
}
for _package in (_NEMO, _NEMO + "text_to_image."):
    TARGETS[_package + "controlnet.controlnet.ControlLDM"] = "controlnet.model.controlled.ControlledUNet"
    TARGETS[_package + "controlnet.controlnet.MegatronControlNet"] = "controlnet.model.controlled.ControlledUNet"
    TARGETS[_package + "controlnet.controlnet.ControlledUnetModel"] = "controlnet.model.unet.UNet"
    TARGETS[_package + "controlnet.controlnet.ControlNet"] = "controlnet.model.controlnet.ControlNet"
    TARGETS[_package + "stable_diffusion.ldm.autoencoder.AutoencoderKL"] = "controlnet.conditioning.AutoencoderKL"

# Arguments that a target's own defaults give a meaning that ours would not.
TARGET_DEFAULTS: dict[str, dict[str, Any]] = {
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": {"layer": "penultimate"},
    _NEMO_SD + "encoders.modules.FrozenOpenCLIPEmbedder": {"layer": "penultimate"},
}

REFUSED_TARGETS: dict[str, str] = {
    _NEMO_SD + "encoders.modules.FrozenMegatronCLIPEmbedder": (
        "its weights exist only as Megatron checkpoints; use a transformers folder of the same CLIP text encoder"
    ),
}

"""A Stable Diffusion XL small enough for a test: a pipeline folder with random weights, and the recipe at its size."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import controlnet
from controlnet import build, config
from controlnet.training.distributed import StopRequest, World
from controlnet.training.run import prepare
from tests.controlnet import tiny
from tests.controlnet.formats import state
from tests.controlnet.shard_files import jpeg, png, write_tar

RECIPE = Path(controlnet.__file__).parent / "configs" / "sdxl_seg.yaml"
WIDTHS, POOLED = (16, 32), 24  # of the two text encoders, and of the second's projection
SMALL = {"model_channels": 64, "num_res_blocks": 1, "transformer_depth": [0, 1, 2],
         "context_dim": sum(WIDTHS), "adm_in_channels": POOLED + 6 * 256}  # fmt: skip
CAPTIONS = ["a cat", "cat at bat " * 30, ""]


def pipeline(folder):
    """Writes a small SDXL: both text encoders with tokenizers, U-Net and VAE; a ControlNet lies beside the folder."""
    text = tiny.clip_folder(folder / "text_encoder", width=WIDTHS[0], length=77)
    second = CLIPTextConfig(
        **{**text.config.to_dict(), "hidden_size": WIDTHS[1], "intermediate_size": 40, "projection_dim": POOLED}
    )
    torch.manual_seed(1)
    CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    for number, pad in (("", "<|endoftext|>"), ("_2", "a")):  # SDXL's second tokenizer pads with token 0, too
        (folder / f"tokenizer{number}").mkdir()
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(folder / "text_encoder" / name, folder / f"tokenizer{number}")
        path = folder / f"tokenizer{number}" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": pad}))
    model = build.build_model(config.load(RECIPE, sizes()).model, weights=False)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05, generator=generator)
    parts = {"model.diffusion_model.": model.unet, "control_model.": model.control}
    tensors = {prefix + name: t.contiguous() for prefix, part in parts.items() for name, t in state(part).items()}
    save_file(tensors, folder.parent / "models.safetensors")
    done = controlnet.convert(folder.parent / "models.safetensors", folder.parent / "models", "diffusers")
    assert set(done.written) == {"unet", "control"}
    shutil.move(folder.parent / "models" / "unet", folder / "unet")
    vae = tiny.vae()
    vae.register_to_config(scaling_factor=0.13025)
    vae.save_pretrained(folder / "vae")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(folder / "hint.png")
    return folder


def sizes():
    stages = ("unet_config", "control_stage_config")
    return [f"model.{stage}.{key}={value}" for stage in stages for key, value in SMALL.items()] + [
        "model.control_stage_config.hint_block_channels=[8, 16]"
    ]


def configuration(pipeline, folder, *overrides):
    """The recipe at reduced width, on shards of pictures of two shapes."""
    rng, shapes, files = np.random.default_rng(0), [(16, 16), (20, 31)] * 4, []
    for number, shape in enumerate(shapes):
        pixels = rng.integers(0, 256, (2, *shape, 3), dtype=np.uint8)
        members = {"jpg": jpeg(pixels[0]), "txt": CAPTIONS[number % 2].encode(), "png": png(pixels[1])}
        files += [(f"{number:05d}.{extension}", content) for extension, content in members.items()]
    folder.mkdir(parents=True, exist_ok=True)
    shard = write_tar(folder / "0.tar", files)
    ours = [
        f"exp_manager.explicit_log_dir={folder}/run",
        f"data.train.dataset_path=[{shard}]",
        "data.train.buckets.sizes=['16, 16', '16, 24']",
        "data.train.augmentations={resize_smallest_side: null, center_crop_h_w: null, horizontal_flip: 0.5}",
        "data.webdataset.local_root_path=null",
        "data.num_workers=0",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
        f"model.unet_config.from_pretrained={pipeline}",
        f"model.first_stage_config.from_pretrained={pipeline}",
        f"model.cond_stage_config.version={pipeline}",
        "model.cond_stage_config.precision=fp32",
        "model.first_stage_config.precision=fp32",
        "model.image_logger={max_images: 2, batch_frequency: 2, log_images_kwargs: {ddim_steps: 2}}",
        "model.text_embedding_dropout_rate=0.5",
        "trainer.accelerator=cpu",
        "trainer.precision=fp32",
        "trainer.max_epochs=-1",
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=False",
        "trainer.control_sensitivity_every_n_steps=1",
        "exp_manager.create_tensorboard_logger=False",
        "optim.lr=1e-3",
        "optim.sched.warmup_steps=0",
    ]
    return config.load(RECIPE, [*sizes(), *ours, *overrides])


def trainer(cfg):
    return prepare(cfg, World(0, 1, 0, torch.device("cpu")), StopRequest())

"""A run small enough for a test: two-level U-Net, lossless first stage, word embeddings, made-up data."""

import json

import torch

from controlnet import build, config
from controlnet.training.distributed import StopRequest, World
from controlnet.training.trainer import Trainer

WORDS = ["red", "green", "blue"]
UNET = {
    "in_channels": 12,
    "out_channels": 12,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 16,
}
BASE = {
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 3,
        "log_every_n_steps": 1,
        "control_sensitivity_every_n_steps": 1,
        "enable_progress_bar": False,
    },
    "exp_manager": {
        "create_tensorboard_logger": False,
        "checkpoint_callback_params": {"every_n_train_steps": 0},
    },
    "model": {
        "micro_batch_size": 2,
        "scale_factor": 1.0,
        "text_embedding_dropout_rate": 0.3,
        "unet_config": {**UNET, "_target_": "controlnet.model.unet.UNet"},
        "control_stage_config": {
            **{key: value for key, value in UNET.items() if key != "out_channels"},
            "_target_": "controlnet.model.controlnet.ControlNet",
            "hint_channels": 3,
            "hint_block_channels": [8, 16],
        },
        "first_stage_config": {"_target_": "controlnet.conditioning.SpaceToDepth", "factor": 2},
        "cond_stage_config": {
            "_target_": "controlnet.conditioning.WordEmbedder",
            "vocabulary": WORDS,
            "dim": 16,
            "max_length": 4,
        },
        "image_logger": {"max_images": 0, "log_images_kwargs": {"ddim_steps": 2}},
    },
    "optim": {"lr": 1e-3},
}


def configuration(folder, *overrides):
    return config.compose(BASE, [f"exp_manager.explicit_log_dir={folder}", *overrides])


def sample(number, size=16):
    """Sample `number` of the made-up data set: an image, its hint and its caption, a function of the number."""
    generator = torch.Generator().manual_seed(number)
    image = torch.rand(3, size, size, generator=generator) * 2 - 1
    return image, (image > 0).float(), " ".join(WORDS[(number + i) % 3] for i in range(number % 3 + 1))


class Loader:
    """Stands for `data.ShardLoader`: batch i of rank r is samples (i * world_size + r) * batch_size onwards."""

    def __init__(self, batch_size, rank=0, world_size=1, epoch_batches=100, start=None):
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.epoch_batches = epoch_batches
        self.next = start["next"] if start else 0
        self.drops = {}
        self.handed_out = []

    @property
    def epoch(self):
        return self.next // self.epoch_batches

    @property
    def position(self):
        return {"next": self.next}

    def __iter__(self):
        end = (self.epoch + 1) * self.epoch_batches
        while self.next < end:
            first = (self.next * self.world_size + self.rank) * self.batch_size
            numbers = range(first, first + self.batch_size)
            images, hints, captions = zip(*(sample(number) for number in numbers), strict=True)
            self.next += 1
            self.handed_out += numbers
            yield {
                "images": torch.stack(images),
                "hint": torch.stack(hints),
                "captions": list(captions),
                "keys": [f"sample-{number}" for number in numbers],
            }


def trainer(cfg, world=None, *, streams=None, loader=Loader, stop=None, awake=True):
    """A Trainer over made-up data. `awake` gives the zero layers weights, so that every parameter gets a gradient."""
    world = world or World(0, 1, 0, torch.device("cpu"))
    torch.manual_seed(cfg.model.seed)
    model = build.build_model(cfg.model)
    if awake:
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.copy_(0.05 * torch.randn(parameter.shape))  # the same in every memory format

    def make_loader(position):
        return loader(cfg.model.micro_batch_size, world.rank, world.size, start=position)

    conditioning = build.build_conditioning(cfg.model)
    return Trainer(cfg, world, model, conditioning, make_loader, stop or StopRequest(), streams)


# Adam whose update is nearly linear in the gradient: rounding stays rounding, where the usual eps would turn the sign
# of a gradient that is all rounding into a whole step. For comparing two ways to compute the same thing.
LINEAR = ["optim.eps=1", "optim.lr=1"]


def assert_same_weights(first, theirs):
    """A run with LINEAR ended with these weights, up to the rounding of float32 sums."""
    start = weights(trainer(first.cfg))
    moved = [(tensor - start[name]).abs().max() for name, tensor in weights(first).items()]
    assert max(moved) > 1e-3  # hundreds of times what is tolerated below
    ours = weights(first)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=3e-6, rtol=1e-5), (name, (tensor - theirs[name]).abs().max())


def rows(folder):
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    """A copy of all trained weights, by name."""
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}

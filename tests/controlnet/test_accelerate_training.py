"""The step of diffusers' scripts train_controlnet.py and train_controlnet_sdxl.py, with and without `accelerate`."""

import copy
import importlib.util
import types
import warnings

import diffusers
import pytest
import torch
from diffusers.models import attention_processor
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

import controlnet
from tests.controlnet.diffusers_models import CONTEXT, added_conditions, fused, unet, vae
from tests.controlnet.diffusers_models import controlnet as control_model

BATCH, STEPS = 2, 4


@pytest.fixture
def accelerator():
    """A new one, as `accelerate launch --mixed_precision=...` gives it to the script."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def new(mixed_precision):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)

    yield new
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def models(variant):
    base = unet(variant)
    control = control_model(base)
    for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for net in (base, control):
        net.to(memory_format=torch.channels_last)  # as `accelerate` has them: convolutions round otherwise, too
    return vae(), base, control


def batches(variant):
    generator = torch.Generator().manual_seed(9)
    for _ in range(STEPS):
        batch = {
            "pixel_values": 2 * torch.rand(BATCH, 3, 64, 64, generator=generator) - 1,
            "conditioning_pixel_values": torch.rand(BATCH, 3, 64, 64, generator=generator),
            "prompt_embeds": torch.randn(BATCH, 7, CONTEXT, generator=generator),
        }
        yield batch | ({"unet_added_conditions": added_conditions(BATCH, torch.float32)} if variant == "sdxl" else {})


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-5)


def adamw_8bit(parameters):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-5)


def train(run, parts, variant, dtype, optimizer_class=adamw, ema=False):
    """The script's loop: the losses, the trained parameters, and the predictions.

    Random numbers are drawn in float32 and rounded to bfloat16, so that they are the same in every precision.
    """
    first_stage, base, control = parts
    schedule = diffusers.DDPMScheduler()
    first_stage.requires_grad_(False)
    base.requires_grad_(False)
    control.train()
    optimizer = optimizer_class(control.parameters())
    rate = diffusers.optimization.get_scheduler("constant", optimizer=optimizer)
    average = EMAModel(control.parameters(), decay=0.5) if ema else None
    weight_dtype = torch.bfloat16 if run.mixed_precision == "bf16" else dtype
    if dtype == torch.float64:
        control.double()
    control, optimizer, rate = run.prepare(control, optimizer, rate)
    for part in (first_stage, base):
        part.to(run.device, dtype=weight_dtype)
    losses, predictions = [], []
    for seed, batch in enumerate(batches(variant)):
        torch.manual_seed(seed)
        with run.accumulate(control):
            latents = first_stage.encode(batch["pixel_values"].to(dtype=weight_dtype)).latent_dist.mode()
            latents = latents * first_stage.config.scaling_factor
            noise = torch.randn(latents.shape).bfloat16().to(latents)
            timesteps = torch.randint(0, schedule.config.num_train_timesteps, (BATCH,)).long()
            noisy = schedule.add_noise(latents.float(), noise.float(), timesteps).to(dtype=weight_dtype)
            context = batch["prompt_embeds"].to(weight_dtype)
            hint = batch["conditioning_pixel_values"].to(dtype=weight_dtype)
            added = {}
            if "unet_added_conditions" in batch:
                conditions = batch["unet_added_conditions"].items()
                added = {"added_cond_kwargs": {name: value.to(weight_dtype) for name, value in conditions}}
            down, middle = control(
                noisy, timesteps, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False, **added
            )
            prediction = base(
                noisy,
                timesteps,
                encoder_hidden_states=context,
                down_block_additional_residuals=[sample.to(dtype=weight_dtype) for sample in down],
                mid_block_additional_residual=middle.to(dtype=weight_dtype),
                return_dict=False,
                **added,
            )[0]
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            loss = F.mse_loss(prediction.to(wide), noise.to(wide), reduction="mean")
            run.backward(loss)
            if run.sync_gradients:
                run.clip_grad_norm_(control.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad(set_to_none=True)
        if average is not None and run.sync_gradients:
            average.step(control.parameters())
        losses.append(loss.detach())
        predictions.append(prediction.detach())
    if average is not None:
        average.copy_to(control.parameters())
    weights = [p.detach() for p in run.unwrap_model(control).parameters()]
    return torch.stack(losses), weights, torch.stack(predictions)


def checkpointing(base, control, monkeypatch):
    control.enable_gradient_checkpointing()


def xformers(base, control, monkeypatch):
    """What the flag sets: xformers' processor, on a stand-in for its function where the package is absent."""

    def attend(query, key, value, attn_bias=None, op=None, scale=None):
        assert attn_bias is None
        return (scale * query @ key.transpose(1, 2)).softmax(-1) @ value

    stand_in = types.SimpleNamespace(ops=types.SimpleNamespace(memory_efficient_attention=attend))
    if importlib.util.find_spec("xformers") is None:
        monkeypatch.setattr(attention_processor, "xformers", stand_in)
    for net in (base, control):
        net.set_attn_processor(attention_processor.XFormersAttnProcessor())


def nothing(base, control, monkeypatch):
    pass


def both_ways(accelerator, variant, precision, dtype, option, monkeypatch, **options):
    """What `train` returns for diffusers' models, and for the same models accelerated, without a fallback."""
    ours = models(variant)
    option(*ours[1:], monkeypatch)
    theirs = copy.deepcopy(ours)
    expected = train(accelerator(precision), theirs, variant, dtype, **options)
    for net in ours[1:]:
        controlnet.accelerate(net)
    with fused() as counts, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fast path")
        actual = train(accelerator(precision), ours, variant, dtype, **options)
    transformers = sum(type(m).__name__ == "BasicTransformerBlock" for net in ours[1:] for m in net.modules())
    assert counts["attention"] >= 2 * STEPS * transformers
    assert len(set(expected[0].tolist())) == STEPS
    return actual, expected


@pytest.mark.parametrize("option", [nothing, checkpointing, xformers], ids=lambda option: option.__name__)
@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
def test_losses_and_weights_in_float64(variant, option, accelerator, monkeypatch):
    actual, expected = both_ways(accelerator, variant, "no", torch.float64, option, monkeypatch, ema=True)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=0)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        # AdamW's first steps have the sign of the gradient alone, also where that is rounding: by the largest weight
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-6


@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
def test_predictions_with_mixed_precision(variant, accelerator, monkeypatch):
    """bf16 by accelerate's autocast, with gradient checkpointing: at most twice diffusers' error against float32.

    Over all elements of all predictions: a loss is one number, and the difference of two losses is a matter of luck.
    """
    exact = train(accelerator("no"), models(variant), variant, torch.float32)[2]
    actual, expected = both_ways(accelerator, variant, "bf16", torch.float32, checkpointing, monkeypatch)
    ours, theirs = ((run[2].double() - exact).square().mean().sqrt() for run in (actual, expected))
    assert 0 < ours <= 2 * theirs, f"root mean square error {ours:.2e}, diffusers' {theirs:.2e}"


def test_losses_with_8bit_adam(accelerator, monkeypatch):
    pytest.importorskip("bitsandbytes")
    options = {"optimizer_class": adamw_8bit}
    actual, expected = both_ways(accelerator, "sd15", "no", torch.float32, nothing, monkeypatch, **options)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=0)

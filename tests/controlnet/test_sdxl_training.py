"""Stable Diffusion XL trains, goes on and draws at reduced width; text, time ids and steps are diffusers'."""

import dataclasses
import functools
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPTokenizer

import controlnet
from controlnet import build, config, generate
from controlnet.build import opening
from controlnet.conditioning import AutoencoderKL, Conditioning, SpaceToDepth, TextEncoders
from controlnet.inference.drawing import diffusers_scheduler
from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule
from controlnet.model.layers import sinusoids
from controlnet.training.randomness import RandomStreams
from controlnet.training.validation import Validation
from tests.controlnet import tiny, tiny_run, tiny_sdxl
from tests.controlnet.formats import assert_equal, state
from tests.controlnet.tiny_sdxl import CAPTIONS, POOLED, RECIPE, SMALL, WIDTHS, configuration, trainer


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_sdxl.pipeline(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture(scope="module")
def theirs(pipeline):
    """The pipeline of diffusers over the same folder, with its ControlNet."""
    control = diffusers.ControlNetModel.from_pretrained(pipeline.parent / "models" / "controlnet")
    load = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    parts = {name: cls.from_pretrained(pipeline / name) for name, cls in load.items()}
    text = TextEncoders(str(pipeline))
    pipe = diffusers.StableDiffusionXLControlNetPipeline(
        **parts,
        text_encoder=text.first.encoder,
        text_encoder_2=text.second.encoder,
        tokenizer=CLIPTokenizer.from_pretrained(pipeline / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(pipeline / "tokenizer_2"),
        controlnet=control,
        scheduler=diffusers_scheduler("DDIM", NoiseSchedule()),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditioning(pipeline, **options):
    return Conditioning(SpaceToDepth(2), TextEncoders(str(pipeline), **options))


@torch.no_grad()
def test_text_and_vector_are_those_of_diffusers(pipeline, theirs):
    ours = conditioning(pipeline, zeros_for_empty=False)
    time_ids = torch.tensor([[20, 30, 0, 3, 16, 24]] * 3)
    context, y = ours.condition(CAPTIONS, time_ids)
    states, _, pooled, _ = theirs.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    assert context.shape == (3, 77, sum(WIDTHS)) and ours.vector_channels == y.shape[1] == SMALL["adm_in_channels"]
    assert_close(context, states, rtol=1e-5, atol=1e-6)
    ids = theirs._get_add_time_ids((20, 30), (0, 3), (16, 24), torch.float32, POOLED)
    embedded = theirs.unet.add_time_proj(ids.flatten()).reshape(1, -1).expand(3, -1)
    assert_close(y, torch.cat([pooled, embedded], dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tokens", "captions"])
def test_a_dropped_caption_takes_its_pooled_vector_with_it(pipeline, kind):
    ours = conditioning(pipeline)
    time_ids = torch.arange(18).view(3, 6)
    batch = {"captions": CAPTIONS, "tokens": ours.tokenize(CAPTIONS), "time_ids": time_ids}
    batch = {kind: batch[kind], "time_ids": time_ids}
    context, y = ours.batch_condition(batch, torch.tensor([False, True, False]))
    whole, whole_y = ours.condition(CAPTIONS, time_ids)
    assert_close(context[0], whole[0])
    assert_close(y[0], whole_y[0])
    assert whole[1].any() and not context[1:].any() and not y[1:, :POOLED].any() and whole_y[1, :POOLED].any()
    assert torch.equal(y[:, POOLED:], sinusoids(time_ids, 256))
    encoded, encoded_y = conditioning(pipeline, zeros_for_empty=False).batch_condition(batch, torch.ones(3) > 0)
    assert encoded.any() and encoded_y[:, :POOLED].any()
    assert_close(encoded[0], encoded[2])


def test_weights_of_a_checkpoint_replace_the_folders(pipeline, tmp_path):
    text = TextEncoders(str(pipeline))
    tiny.randomised(text, 5)
    first = {f"transformer.{name}": tensor for name, tensor in state(text.first.encoder).items()}
    tensors = {f"conditioner.embedders.0.{name}": tensor for name, tensor in first.items()}
    second = controlnet.checkpoints.openclip.to_original(state(text.second.encoder))
    tensors |= {f"conditioner.embedders.1.{name}": tensor.contiguous() for name, tensor in second.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = TextEncoders(str(pipeline), from_pretrained=str(tmp_path / "x.safetensors"))
    assert_equal(state(loaded), state(text))
    cfg = configuration(pipeline, tmp_path, f"model.ckpt_path={tmp_path}/x.safetensors")
    assert_equal(state(build.build_conditioning(cfg.model).cond_stage), state(text))


def assert_drawn(pipeline, output, *arguments, scheduler=()):
    """`generate` writes a grid of the hint and one picture, which is not flat."""
    usual = ["--hint", str(pipeline / "hint.png"), "--prompt", "a cat", "--steps", "2", "--output", str(output)]
    generate.main([*arguments, *usual, *scheduler])
    picture = np.asarray(Image.open(output))[-20:-4, 4:28]
    assert picture.std() > 5


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_it_trains_and_goes_on_to_the_bit(pipeline, tmp_path, parameterization):
    """4 steps are 2 steps, a checkpoint and 2 more; with offset noise and min-SNR, over batches of two sizes."""
    more = [
        f"model.parameterization={parameterization}",
        "model.offset_noise=0.1",
        "model.min_snr_gamma=5",
        "model.sd_locked=False",
    ]
    whole = trainer(configuration(pipeline, tmp_path / "whole", *more, "trainer.max_steps=4"))
    start = tiny_run.weights(whole)
    whole.fit()
    for steps in (2, 4):
        run = trainer(configuration(pipeline, tmp_path / "parts", *more, f"trainer.max_steps={steps}"))
        run.resume()
        run.fit()
    ends = tiny_run.weights(run)
    assert all(torch.equal(tensor, ends[name]) for name, tensor in tiny_run.weights(whole).items())
    for name in ("control.label_emb.0.0.weight", "control.zero_convs.0.0.weight", "unet.out.2.weight"):
        assert not torch.equal(start[name], ends[name]), name
    rows = tiny_run.rows(tmp_path / "whole" / "run")
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row) and rows[-1]["control_sensitivity"] > 0
    pictures = list((tmp_path / "whole" / "run").rglob("*.png"))
    assert len(pictures) == 2, pictures
    if parameterization == "eps":
        assert_drawn(pipeline, tmp_path / "out.png", "--checkpoint", str(tmp_path / "whole" / "run"))
        controlnet.convert(tmp_path / "whole" / "run", tmp_path / "out", "diffusers")
        loaded = diffusers.ControlNetModel.from_pretrained(tmp_path / "out" / "controlnet")
        name = "add_embedding.linear_1.weight"
        assert torch.equal(loaded.state_dict()[name], ends["control.label_emb.0.0.weight"])


def test_a_batch_s_time_ids_reach_the_loss_and_the_validation(pipeline, tmp_path):
    run = trainer(configuration(pipeline, tmp_path, "model.text_embedding_dropout_rate=0"))
    batch = next(iter(run.make_loader(None)))
    *inputs, y = run._inputs(batch)
    assert torch.equal(y[:, POOLED:], sinusoids(batch["time_ids"], 256)) and len(inputs) == 5
    context = run.conditioning.context(batch["captions"])
    assert torch.equal(inputs[2], context)
    with torch.no_grad():
        loss = run.loss(*inputs, y)
        other = run.loss(*inputs, torch.cat([y[:, :POOLED], y[:, POOLED:].flip(1)], dim=1))
    assert loss != other
    losses = []
    for time_ids in (batch["time_ids"], batch["time_ids"] + 100):
        validation = Validation(lambda t=time_ids: [{**batch, "time_ids": t}], None, 0)
        losses.append(validation.loss(run.model, run.conditioning, run.schedule, run.world, run.stop))
    assert losses[0] != losses[1]


def test_synthetic_data_trains_it_too(pipeline, tmp_path):
    crop = "data.train.augmentations={resize_smallest_side: 16, center_crop_h_w: '16, 16'}"
    run = trainer(configuration(pipeline, tmp_path, "data.synthetic_data=True", crop, "trainer.max_steps=1"))
    run.fit()
    assert run._latest[0]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_min_snr_weighs_the_error_in_x0(kind):
    """Whatever is predicted, a sample's loss is min(snr, gamma) times the squared error of the x_0 that it implies."""
    schedule, gamma = NoiseSchedule(parameterization=kind), 5.0
    generator = torch.Generator().manual_seed(0)
    x0, noise, answer = torch.randn(3, 4, 4, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 150, 400, 999])

    class Answers(torch.nn.Module):
        def forward(self, x, timesteps, context, hint, y=None):
            return answer

    loss = DiffusionLoss(Answers(), schedule, gamma)(x0.float(), None, None, noise.float(), t)
    alpha_bar = schedule.alphas_cumprod[t]
    snr = alpha_bar / (1 - alpha_bar)
    assert snr[0] > gamma > snr[-1]
    wrong = schedule.predict_x0(answer, schedule.add_noise(x0, noise, t), t) - x0
    expected = (snr.clamp(max=gamma) * wrong.pow(2).flatten(1).mean(1)).mean()
    assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_offset_noise_moves_whole_channels(pipeline, tmp_path):
    draws = []
    for offset in (0, 0.5):
        run = trainer(configuration(pipeline, tmp_path, f"model.offset_noise={offset}"))
        draws.append(run._inputs(next(iter(run.make_loader(None))))[3])
    difference = draws[1] - draws[0]
    assert_close(difference, difference.mean((2, 3), keepdim=True).expand_as(difference))
    assert difference.abs().amin() > 1e-4
    drawn = RandomStreams(0, 0, "cpu").offset(torch.zeros(400, 4, 8, 8))
    assert drawn.shape == (400, 4, 1, 1) and abs(drawn.std() - 1) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("negative", ["", "bat"])
def test_two_steps_from_a_converted_file_are_those_of_diffusers(pipeline, theirs, negative):
    origin = opening.open_origin([pipeline.parent / "models" / "controlnet"], base=pipeline)
    model, ours, schedule = origin.models()
    assert ours.scale_factor == 0.13025
    hint = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    request = generate.Request("a cat", negative_prompt=negative, steps=2, guidance_scale=4.0, strength=0.7, seed=3)
    _, latents = generate.generate(model, ours, schedule, hint, request)
    expected = theirs(
        prompt="a cat",
        negative_prompt=negative or None,
        image=hint,
        width=24,
        height=16,
        num_inference_steps=2,
        guidance_scale=4.0,
        controlnet_conditioning_scale=0.7,
        latents=torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3)),
        output_type="latent",
    ).images
    assert_close(latents, expected, rtol=1e-4, atol=2e-4)
    free = dataclasses.replace(request, strength=0.0)
    other = generate.generate(model, ours, schedule, hint, free)[1]
    assert (other - latents).abs().max() > 0.05


def test_a_single_file_states_no_scale_of_its_latents(pipeline, tmp_path, monkeypatch):
    text = conditioning(pipeline).cond_stage

    def first_stage(from_pretrained):
        tiny.vae().save_pretrained(tmp_path / "vae")  # diffusers' default scale
        return AutoencoderKL(str(tmp_path / "vae"))

    monkeypatch.setattr(opening, "AutoencoderKL", first_stage)
    monkeypatch.setattr(opening, "TextEncoders", lambda from_pretrained: text)
    monkeypatch.setattr(opening, "CLIPTextEncoder", lambda from_pretrained: text.first)
    file = tmp_path / "base.safetensors"
    assert opening._conditioning_of(file, is_xl=True).scale_factor == 0.13025
    assert opening._conditioning_of(file, is_xl=False).scale_factor == 0.18215


@torch.no_grad()
def test_a_whole_single_file_is_a_base(pipeline, tmp_path, monkeypatch):
    """Two steps of `generate --base FILE` are those of the pipeline's folder that the file was converted from."""
    control, file = pipeline.parent / "models" / "controlnet", tmp_path / "base.safetensors"
    done = controlnet.convert(pipeline, file, "original")
    assert set(done.written) == {"unet", "first_stage", "cond_stage", "cond_stage_2"}, done
    # A file holds weights alone: the VAE's sizes and the tokenizers are Stable Diffusion XL's own, here the small ones.
    other = tmp_path / "other"  # the same text encoders with other weights
    shutil.copytree(pipeline, other, ignore=shutil.ignore_patterns("unet", "vae"))
    for weights in other.glob("text_encoder*/model.safetensors"):
        save_file(
            {name: torch.ones_like(tensor) for name, tensor in load_file(weights).items()}, weights, {"format": "pt"}
        )
    sizes = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4}
    monkeypatch.setattr(opening, "AutoencoderKL", functools.partial(AutoencoderKL, ddconfig=sizes))
    monkeypatch.setattr(opening, "TextEncoders", functools.partial(TextEncoders, version=str(other)))
    hint = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    request = generate.Request("a cat", negative_prompt="bat", steps=2, guidance_scale=4.0, seed=3)
    whole = generate.generate(*opening.open_origin([control], base=file).models(), hint, request)
    assert_drawn(pipeline, tmp_path / "x.png", "--base", str(file), "--checkpoint", str(control))
    monkeypatch.undo()
    folder = generate.generate(*opening.open_origin([control], base=pipeline).models(), hint, request)
    for ours, expected in zip(whole, folder, strict=True):
        assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_generate_draws_by_a_base_and_by_a_configuration(pipeline, tmp_path):
    control = str(pipeline.parent / "models" / "controlnet")
    base = ["--base", str(pipeline), "--checkpoint", control]
    assert_drawn(pipeline, tmp_path / "1.png", *base, scheduler=["--scheduler", "Euler"])
    hint = ["--hint", str(pipeline / "hint.png")]
    two = [*base, "--weight", "1", "--checkpoint", control, *hint, "--weight", "0.5"]
    assert_drawn(pipeline, tmp_path / "2.png", *two)
    file = tmp_path / "config.yaml"
    cfg = configuration(pipeline, tmp_path / "data")
    file.write_text(OmegaConf.to_yaml(cfg))
    assert_drawn(pipeline, tmp_path / "3.png", "--config", str(file), "--checkpoint", control)


@pytest.mark.parametrize(
    "stated", [{"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
               {"_class_name": "LCMScheduler"}]
)  # fmt: skip
def test_few_step_schedulers_are_refused_before_weights_are_read(pipeline, tmp_path, stated):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(stated))
    (tmp_path / "unet").mkdir()
    shutil.copy(pipeline / "unet" / "config.json", tmp_path / "unet")
    with pytest.raises(SystemExit, match=r"scheduler_config.json has .*\(Turbo, Lightning, LCM\), which is not served"):
        assert_drawn(pipeline, tmp_path / "x.png", "--base", str(tmp_path), "--checkpoint", str(pipeline))


def test_control_types_are_refused(pipeline, tmp_path, capsys):
    tensors = {"task_embedding": torch.zeros(6, 320), "controlnet_cond_embedding.conv_in.bias": torch.zeros(16)}
    save_file(tensors, tmp_path / "union.safetensors")
    union = ["--checkpoint", str(tmp_path / "union.safetensors")]
    with pytest.raises(SystemExit, match="a ControlNet-Union, with control types that are not served"):
        assert_drawn(pipeline, tmp_path / "x.png", "--base", str(pipeline), *union)
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Not served: ControlNet-Union's control types, and the few-step schedulers" in text


def test_what_does_not_go_together_is_one_error(pipeline, tmp_path):
    cfg = configuration(pipeline, tmp_path, "model.unet_config.adm_in_channels=1561")
    with pytest.raises(config.ConfigError, match="adm_in_channels is 1561; expected 1560: the condition stage gives a"):
        build.build_conditioning(cfg.model)
    clip = f"{{_target_: controlnet.conditioning.CLIPTextEncoder, version: {pipeline}/text_encoder}}"
    cfg = configuration(pipeline, tmp_path)
    cfg.model.cond_stage_config = config.parse(f"a: {clip}", tmp_path)["a"]
    cfg.model.unet_config.context_dim = WIDTHS[0]
    with pytest.raises(config.ConfigError, match="is 1560; expected None: the condition stage gives no vector y"):
        build.build_conditioning(cfg.model)
    ours = conditioning(pipeline)
    with pytest.raises(ValueError, match="the batch has captions; expected time_ids"):
        ours.batch_condition({"captions": CAPTIONS}, torch.zeros(3) > 0)
    with pytest.raises(ValueError, match="the batch has states, pooled; expected time_ids"):
        ours.batch_condition(dict.fromkeys(("states", "pooled")), torch.zeros(3) > 0)
    with pytest.raises(ValueError, match=r"time_ids is \[2, 6\]; expected \[3, 6\]"):
        ours.condition(CAPTIONS, torch.zeros(2, 6))


def test_the_recipe_is_the_whole_model():
    cfg = config.load(RECIPE)
    with torch.device("meta"):
        model = build.build_model(cfg.model, weights=False)
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == 2_567_463_684
    assert model.unet.arch.adm_in_channels == 1280 + 6 * 256 == 2816 and model.unet.arch.context_dim == 768 + 1280
    assert cfg.model.scale_factor == 0.13025 and cfg.model.first_stage_config.precision == "bf16"

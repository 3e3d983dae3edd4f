"""`accelerate` on pipelines of diffusers: same images, nothing computed twice."""

import warnings
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel

import controlnet
from controlnet.diffusers import blocks, exits, memo
from tests.controlnet.diffusers_models import controlnet as control_model
from tests.controlnet.diffusers_models import draw, image, pipeline, prompt, unet, vae

CONTROLLED = "StableDiffusionControlNetPipeline"
SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
}
TOLERANCE = 1e-4  # of the image range, which is 1


class Calls:
    """How often the models of a pipeline ran, and how often what they keep was computed, and of how many images."""

    def __init__(self, pipe):
        self.counts = {"unet": 0, "control": 0, "hint": [], "context": 0, "projections": 0}
        control = getattr(pipe, "controlnet", None)
        controls = [] if control is None else getattr(control, "nets", [control])
        self._hooks = [pipe.unet.register_forward_hook(lambda *_: self._add("unet"))]
        for net in controls:
            # of each model, an exit: at scale 0 it is not reached
            self._hooks.append(net.down_blocks[0].resnets[0].register_forward_hook(self._control))

    def _control(self, *_):
        self.counts["control"] += not exits.skipping()

    def _add(self, name):
        self.counts[name] += 1

    def _computed(self, owner, compute):
        if not isinstance(owner, blocks.ControlNetConditioningEmbedding):
            self._add({"Attention": "context", "Shared": "projections"}[type(owner).__name__])
            return compute()
        note = owner.conv_in.register_forward_hook(lambda m, args, y: self.counts["hint"].append(len(y)))
        result = compute()
        note.remove()
        return result

    def __enter__(self):
        keep = memo.keep

        def counted(owner, tensors, compute):
            return keep(owner, tensors, lambda: self._computed(owner, compute))

        self._patch = mock.patch.object(memo, "keep", counted)
        self._patch.start()
        return self.counts

    def __exit__(self, *_):
        self._patch.stop()
        for hook in self._hooks:
            hook.remove()


def attentions(pipe):
    """How many attentions read the prompt."""
    control = getattr(pipe, "controlnet", None)
    models = [pipe.unet, *([] if control is None else getattr(control, "nets", [control]))]
    return sum(name.endswith("attn2") for model in models for name, _ in model.named_modules())


def check(pipe, arguments, tolerance=TOLERANCE):
    """Draws before and after `accelerate`, and after `restore`; returns what was computed in between."""
    before = draw(pipe, **arguments)
    assert before.std() > 0.01, "a picture of nothing"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fast path")
        controlnet.accelerate(pipe)
        with Calls(pipe) as counts:
            after = draw(pipe, **arguments)
    assert counts["unet"] > 0
    assert (after - before).abs().max() < tolerance
    controlnet.restore(pipe)
    assert torch.equal(draw(pipe, **arguments), before)
    return counts


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_twenty_steps(scheduler):
    pipe = pipeline()
    pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
    counts = check(pipe, prompt(image=image(), num_inference_steps=20))
    assert counts == {"unet": 20, "control": 20, "hint": [1], "context": attentions(pipe), "projections": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"guess_mode": True},
        {"guess_mode": True, "guidance_scale": 1.0},
        {"controlnet_conditioning_scale": 0.35},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 3},
        {"height": 72, "width": 104},
        {"height": 80, "width": 48, "guess_mode": True, "num_images_per_prompt": 2},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_options(options):
    size = {"height": options.get("height", 64), "width": options.get("width", 64)}
    check(pipeline(), prompt(image=image(**size), num_inference_steps=3) | options)


def test_batch_of_different_hints():
    counts = check(pipeline(), prompt(batch=2, image=image(batch=2), num_inference_steps=3))
    assert counts["hint"] == [2]  # of the four that guidance asks for


def test_control_window_runs_the_controlnet_in_it_alone():
    window = {"control_guidance_start": 0.2, "control_guidance_end": 0.6}
    counts = check(pipeline(), prompt(image=image(), num_inference_steps=10) | window)
    assert (counts["unet"], counts["control"], counts["hint"]) == (10, 4, [1])


def test_several_controlnets():
    options = {"controlnet_conditioning_scale": [0.7, 0.4], "control_guidance_end": [1.0, 0.5]}
    images = {"image": [image(seed=1), image(seed=2)]}
    counts = check(pipeline(controls=2), prompt(num_inference_steps=4) | options | images)
    assert (counts["unet"], counts["control"], counts["hint"]) == (4, 6, [1, 1])


def test_several_controlnets_in_guess_mode():
    images = {"image": [image(seed=1), image(seed=2)]}
    check(pipeline(controls=2), prompt(num_inference_steps=3, guess_mode=True) | images)


@pytest.mark.parametrize("control", [False, True])
def test_image_to_image(control):
    kind = f"StableDiffusion{'ControlNet' if control else ''}Img2ImgPipeline"
    hint = {"control_image": image(seed=9)} if control else {}
    counts = check(pipeline(kind), prompt(image=image(), strength=0.6, num_inference_steps=5) | hint)
    assert counts["projections"] == 1 + control


@pytest.mark.parametrize("control", [False, True])
def test_inpainting(control):
    kind = f"StableDiffusion{'ControlNet' if control else ''}InpaintPipeline"
    hint = {"control_image": image(seed=9)} if control else {}
    mask = (image(seed=3)[:, :1] > 0.5).float()
    size = {"height": 64, "width": 64}
    check(pipeline(kind), prompt(image=image(), mask_image=mask, strength=1.0, num_inference_steps=3) | hint | size)


def test_inpainting_unet_with_nine_channels():
    pipe = pipeline("StableDiffusionInpaintPipeline", in_channels=9)
    mask = (image(seed=3)[:, :1] > 0.5).float()
    size = {"height": 64, "width": 64}
    check(pipe, prompt(image=image(), mask_image=mask, num_inference_steps=3) | size)


def test_text_to_image():
    check(pipeline("StableDiffusionPipeline"), prompt(num_inference_steps=3))


def test_stable_diffusion_2_with_v_prediction():
    pipe = pipeline(variant="sd21")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    check(pipe, prompt(image=image(), num_inference_steps=3))


@pytest.mark.parametrize("control", [False, True])
def test_stable_diffusion_xl(control):
    kind = f"StableDiffusionXL{'ControlNet' if control else ''}Pipeline"
    base = unet("sdxl")
    parts = {"vae": vae(), "unet": base, "scheduler": diffusers.DDIMScheduler(clip_sample=False)}
    parts |= {"controlnet": control_model(base)} if control else {}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = getattr(diffusers, kind)(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pooled = dict(zip(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), torch.randn(2, 1, 16), strict=True))
    hint = {"image": image()} if control else {}
    size = {"height": 64, "width": 64}
    counts = check(pipe, prompt(num_inference_steps=4) | pooled | hint | size)
    assert counts["context"] == attentions(pipe) and counts["hint"] == [1] * control


def test_a_module_in_two_pipelines():
    one = pipeline()
    two = diffusers.StableDiffusionPipeline(
        **{name: part for name, part in one.components.items() if name != "controlnet"}, requires_safety_checker=False
    )
    two.set_progress_bar_config(disable=True)
    two.scheduler = diffusers.EulerDiscreteScheduler.from_config(one.scheduler.config)
    first, second = prompt(image=image(), num_inference_steps=3), prompt(num_inference_steps=4, seed=8)
    expected = draw(one, **first), draw(two, **second)
    controlnet.accelerate(one)
    controlnet.accelerate(two)
    for _ in range(2):
        for pipe, arguments, picture in ((one, first, expected[0]), (two, second, expected[1])):
            assert (draw(pipe, **arguments) - picture).abs().max() < TOLERANCE


def test_the_pipeline_is_saved_as_diffusers(tmp_path):
    pipe = controlnet.accelerate(pipeline())
    pipe.save_pretrained(tmp_path)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    again = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path, local_files_only=True, **nothing)
    assert type(again.unet) is diffusers.UNet2DConditionModel
    assert type(again.controlnet) is diffusers.ControlNetModel
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], tensor)


# --- values kept between steps are never stale: each is changed in the middle of a loop


def change_prompt(pipe, values):
    values["prompt_embeds"] = values["prompt_embeds"].flip(1) * 2


def change_prompt_in_place(pipe, values):
    values["prompt_embeds"].mul_(-0.5)


def change_hint(pipe, values):
    values["image"] = 1 - 3 * values["image"]


def change_hint_in_place(pipe, values):
    values["image"].mul_(-3)


def change_weights_in_place(pipe, values):
    for model in (pipe.unet, pipe.controlnet):
        for parameter in model.parameters():
            parameter.mul_(0.8)


def change_weights_data(pipe, values):
    for model in (pipe.unet, pipe.controlnet):
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.8


def load_weights(pipe, values):
    for model in (pipe.unet, pipe.controlnet):
        model.load_state_dict({name: tensor * 0.8 for name, tensor in model.state_dict().items()})


def assign_weights(pipe, values):
    for model in (pipe.unet, pipe.controlnet):
        model.load_state_dict({name: tensor * 0.8 for name, tensor in model.state_dict().items()}, assign=True)


def replace_a_layer(pipe, values):
    layer = pipe.unet.up_blocks[3].attentions[2].transformer_blocks[0].attn2
    layer.to_k = torch.nn.Linear(layer.to_k.in_features, layer.to_k.out_features, bias=False)
    torch.nn.init.eye_(layer.to_k.weight)


def fuse_a_lora(pipe, values):
    add_lora(pipe.unet)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()


def write_ema_weights(pipe, values):
    ema = EMAModel([p.detach() * 0.8 for p in pipe.unet.parameters()])
    ema.copy_to(pipe.unet.parameters())


def add_lora(model):
    from peft import LoraConfig

    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False))


CHANGES = [
    change_prompt,
    change_prompt_in_place,
    change_hint,
    change_hint_in_place,
    change_weights_in_place,
    change_weights_data,
    load_weights,
    assign_weights,
    replace_a_layer,
    fuse_a_lora,
    write_ema_weights,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_stale(change):
    def draw_with_change(pipe):
        def callback(pipe, step, timestep, values):
            if step == 0:
                change(pipe, values)
            return values

        tensors = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", *changed]}
        return draw(pipe, **prompt(image=image(), num_inference_steps=4) | tensors)

    changed = ["prompt_embeds", "image"]
    pipeline_class = diffusers.StableDiffusionControlNetPipeline
    known = pipeline_class._callback_tensor_inputs
    pipeline_class._callback_tensor_inputs = [*known, "image"]
    try:
        expected = draw_with_change(pipeline())
        unchanged = draw(pipeline(), **prompt(image=image(), num_inference_steps=4))
        actual = draw_with_change(controlnet.accelerate(pipeline()))
    finally:
        pipeline_class._callback_tensor_inputs = known
    assert (expected - unchanged).abs().max() > 10 * TOLERANCE, "the change is not to be seen"
    assert (actual - expected).abs().max() < TOLERANCE


def test_another_schedule():
    pipe = pipeline()
    arguments = prompt(image=image())
    expected = [draw(pipe, **arguments, num_inference_steps=steps) for steps in (3, 5, 3)]
    controlnet.accelerate(pipe)
    for steps, picture in zip((3, 5, 3), expected, strict=True):
        assert (draw(pipe, **arguments, num_inference_steps=steps) - picture).abs().max() < TOLERANCE

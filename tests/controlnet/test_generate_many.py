"""Many pictures at once: prompts of a file, hints of a folder, several ControlNets, and files in NeMo's layout."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import controlnet
from controlnet import conditioning, generate
from controlnet.build.opening import open_origin
from controlnet.checkpoints import archive
from controlnet.checkpoints.convert import convert
from controlnet.config import ConfigError
from controlnet.config.infer import nemo_options
from controlnet.inference.images import to_uint8
from controlnet.inference.jobs import jobs, read_prompts
from controlnet.inference.sampling import ddim
from controlnet.model.controlled import ControlledUNet
from controlnet.model.diffusion import NoiseSchedule
from controlnet.model.several import SeveralControlNets
from tests.controlnet import tiny, tiny_run
from tests.controlnet.test_generate import SIZE, assert_same_picture, command, images_in, run  # noqa: F401


@pytest.fixture
def hints(tmp_path):
    """A folder of three hints, one a depth map of 16 bits, each with its prompt beside it."""
    folder = tmp_path / "hints"
    folder.mkdir()
    for number, name in enumerate(("a", "b")):
        pixels = (tiny_run.sample(number)[1] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{name}.png")
    Image.fromarray(np.linspace(0, 65535, SIZE, dtype=np.uint16)[None].repeat(SIZE, 0)).save(folder / "c.png")
    for name, prompt in (("a", "red"), ("b", "green"), ("c", "blue")):
        (folder / f"{name}.txt").write_text(prompt)
    return folder


def test_a_folder_of_hints_with_the_prompts_beside_them(run, hints, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    generate.main(
        ["--checkpoint", str(run[0] / "run"), "--hint", str(hints), "--steps", "2", "--num-images", "2", "--seed", "7"]
        + ["--images", str(out), "--output", str(tmp_path / "grid.png")]
    )
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{n:04d}-{stem}-{seed}.png" for n, stem in enumerate("abc") for seed in (7, 8)]
    for name, prompt in (("0000-a-7.png", "red"), ("0002-c-8.png", "blue")):
        one = Image.open(out / name)
        single = command(run, "--hint", str(hints / f"{name[5]}.png"), "--prompt", prompt, "--seed", one.text["seed"],
                         "--steps", "2")  # fmt: skip
        assert_same_picture(np.asarray(one), images_in(single, 1)[0])
        assert one.text["prompt"] == prompt and one.text["hint"].endswith(f"{name[5]}.png")
        assert one.text["steps"] == "2" and one.text["guidance_scale"] == "7.5" and one.text["strength"] == "1.0"
    assert Image.open(tmp_path / "grid.png").text["prompt"] == "red\ngreen\nblue"


def test_a_file_of_prompts(run, tmp_path):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("red\n\n  green blue \n", encoding="utf-8-sig")
    out = tmp_path / "out"
    command(run, "--prompts", str(tmp_path / "prompts.txt"), "--images", str(out))
    found = {Image.open(path).text["prompt"]: np.asarray(Image.open(path)) for path in out.iterdir()}
    assert found.keys() == {"red", "green blue"}
    assert_same_picture(found["red"], images_in(command(run, "--prompt", "red"), 1)[0])


def test_two_controlnets_add_up(run):  # noqa: F811
    checkpoint = str(run[0] / "run")
    one = images_in(command(run), 1)[0]
    off = images_in(command(run, "--strength", "0"), 1)[0]
    assert np.abs(one.astype(int) - off).max() > 2
    twice = ("--checkpoint", checkpoint, "--checkpoint", checkpoint)
    halves = command(run, *twice, "--weight", "0.5", "--weight", "0.5")
    top = 2 * (4 + 14 + SIZE) + 4 + 14  # two hints above
    assert_same_picture(halves[top : top + SIZE, 4 : 4 + SIZE], one)
    first = command(run, *twice, "--weight", "1", "--weight", "0")
    assert_same_picture(first[top : top + SIZE, 4 : 4 + SIZE], one)
    assert_same_picture(images_in(command(run, "--weight", "0"), 1)[0], off)


def test_several_controlnets_are_the_weighted_sum(tmp_path):
    torch.manual_seed(0)
    cfg = tiny_run.configuration(tmp_path)
    first, second = (tiny_run.trainer(cfg).model.eval() for _ in range(2))
    for parameter in second.control.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    x, t, context = torch.randn(2, 12, 8, 8), torch.tensor([5, 900]), torch.randn(2, 4, 16)
    hints = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    several = ControlledUNet(first.unet, SeveralControlNets([first.control, second.control], [0.5, -2.0])).eval()
    with torch.no_grad():
        h, skips = first.unet.encode(x, t, context)
        outputs = [model.control(x, hint, t, context) for model, hint in zip((first, second), hints, strict=True)]
        residuals = [0.5 * a - 2 * b for a, b in zip(*outputs, strict=True)]
        expected = first.unet.decode(h, skips, residuals, t, context)
        prepared = several.prepare_context(context)
        features = several.control.encode_hint(torch.cat(hints, 1))
        got = several(x, t, prepared, guided_hint=features)
    assert torch.allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_controlnets_that_do_not_go_together(tmp_path):
    ours = tiny_run.trainer(tiny_run.configuration(tmp_path)).model.control
    wide = [f"model.{stage}.model_channels=64" for stage in ("unet_config", "control_stage_config")]
    theirs = tiny_run.trainer(tiny_run.configuration(tmp_path, *wide)).model.control
    with pytest.raises(ValueError, match="ControlNet 2 has output channels"):
        SeveralControlNets([ours, theirs], [1, 1])
    with pytest.raises(ValueError, match="1 weights for 2 ControlNets"):
        SeveralControlNets([ours, ours], [1])


def test_pairs_of_hints_and_prompts(hints):
    assert [(job.name, job.prompt) for job in jobs([[hints]], ["x"])] == [
        ("0000-a", "x"), ("0001-b", "x"), ("0002-c", "x"),
    ]  # fmt: skip
    assert [job.prompt for job in jobs([[hints]], ["x", "y", "z"])] == ["x", "y", "z"]
    assert [job.name for job in jobs([[hints / "a.png"]], ["x", "y"])] == ["0000-a", "0001-a"]
    assert [job.hints for job in jobs([[hints / "a.png"], [hints / "b.png"]], ["x"], 2)] == [
        (hints / "a.png", hints / "b.png")
    ]
    with pytest.raises(ValueError, match="3 hints and 2 prompts"):
        jobs([[hints]], ["x", "y"])
    with pytest.raises(ValueError, match="--hint is given 2 times for 3 ControlNets"):
        jobs([[hints], [hints]], ["x"], 3)
    (hints / "c.txt").unlink()
    with pytest.raises(ValueError, match="no prompt: give --prompt or --prompts FILE, or write the one of c.png"):
        jobs([[hints]], [])
    with pytest.raises(FileNotFoundError, match="no hint at .*absent"):
        jobs([[hints / "absent"]], ["x"])
    (hints / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="is empty; expected one prompt a line"):
        read_prompts(hints / "empty.txt")


INFER = {
    "name": "stable-diffusion-train",
    "infer": {
        "unconditional_guidance_scale": 3, "num_images_per_prompt": 2, "hint_image_size": SIZE, "height": SIZE,
        "width": SIZE, "down_factor": 8, "inference_steps": 2, "sampler_type": "DDIM", "eta": 0, "output_type": "pil",
        "save_to_file": True, "out_path": "controlnet", "seed": 355, "prompts": ["red"], "control": ["hint.png"],
        "control_image_preprocess": None,
    },
    "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "gpu", "precision": 32, "logger": False},
    "model": {"restore_from_path": "30k.nemo", "precision": "${trainer.precision}", "strength": 2, "guess_mode": False},
}  # fmt: skip


def test_an_inference_file_of_nemo_gives_the_options(run, tmp_path):  # noqa: F811
    tree = json.loads(json.dumps(INFER))
    tree["infer"] |= {"control": [str(run[0] / "hint.png")], "out_path": str(tmp_path / "out")}
    tree["model"]["restore_from_path"] = str(run[0] / "run")
    (tmp_path / "infer.yaml").write_text(json.dumps(tree))
    generate.main(["--config", str(tmp_path / "infer.yaml"), "--output", str(tmp_path / "by_file.png")])
    generate.main(
        ["--checkpoint", str(run[0] / "run"), "--hint", str(run[0] / "hint.png"), "--prompt", "red", "--steps", "2"]
        + ["--seed", "355", "--guidance-scale", "3", "--strength", "2", "--num-images", "2"]
        + ["--output", str(tmp_path / "by_options.png")]
    )
    by_file, by_options = (np.asarray(Image.open(tmp_path / f"by_{name}.png")) for name in ("file", "options"))
    assert np.array_equal(by_file, by_options)
    assert len(list((tmp_path / "out").iterdir())) == 2
    arguments = generate._arguments(["--config", str(tmp_path / "infer.yaml"), "--strength", "1", "--prompt", "blue"])
    assert arguments.strength == 1.0 and arguments.prompt == ["blue"] and arguments.steps == 2


@pytest.mark.parametrize(
    "section, key, value, words",
    [
        ("infer", "control_image_preprocess", "seg2img", "hints are given ready-made"),
        ("infer", "sampler_type", "PLMS", "infer.sampler_type is PLMS; expected one of DDIM"),
        ("infer", "inference_stepps", 3, "infer.inference_stepps is not a known key .nearest: inference_steps"),
        ("infer", "inference_steps", "many", "infer.inference_steps is 'many'; expected int"),
        ("infer", "save_to_file", False, "images are always written"),
        ("trainer", "devices", 2, "images are drawn by one process"),
        ("trainer", "precision", "fp7", "trainer.precision is 'fp7'"),
    ],
)
def test_bad_inference_files(section, key, value, words):
    tree = json.loads(json.dumps(INFER))
    tree[section][key] = value
    with pytest.raises(ConfigError, match=words):
        nemo_options(tree)


def test_every_key_of_nemos_file_has_an_effect_or_a_reason():
    options = nemo_options(INFER)
    assert options == {
        "guidance_scale": 3, "num_images": 2, "size": (SIZE, SIZE), "steps": 2, "scheduler": None, "eta": 0,
        "seed": 355, "prompt": ["red"], "hint": options["hint"], "strength": 2.0, "guess_mode": False,
        "precision": "fp32", "checkpoint": options["checkpoint"], "images": options["images"],
    }  # fmt: skip


def test_sizes_are_checked_before_weights_are_read(run, tmp_path, monkeypatch):  # noqa: F811
    from controlnet.build import opening

    def unread(*arguments, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(opening.models, "build_model", unread)
    with pytest.raises(SystemExit, match="the hint is 15 x 16 pixels"):
        command(run, "--size", "15x16")


def test_base_and_config_exclude_each_other(run, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="leave out --config and settings, or --base"):
        open_origin([run[0] / "run"], base=tmp_path, overrides=["model.seed=1"])
    with pytest.raises(ConfigError, match="--weight is given 2 times for 1 ControlNets"):
        open_origin([run[0] / "run"], weights=[1, 2])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A diffusers pipeline of tiny models with a ControlNet, and a hint beside it."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("pipeline")
    shape = {**tiny_run.UNET, "in_channels": 4, "out_channels": 4}
    torch.manual_seed(0)
    unet = controlnet.UNet(**shape)
    shape.pop("out_channels")
    control = controlnet.ControlNet(hint_channels=3, hint_block_channels=[8, 16], **shape)
    for model in (unet, control):
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()}
    whole |= {f"control_model.{name}": tensor for name, tensor in control.state_dict().items()}
    save_file(whole, folder / "whole.safetensors")
    convert(folder / "whole.safetensors", folder / "sd", "diffusers", num_heads=2)
    tiny.vae().save_pretrained(folder / "sd" / "vae")
    tiny.clip_folder(folder / "sd" / "text_encoder", length=77)
    tiny.clip_folder(folder / "sd" / "tokenizer", length=77)
    Image.fromarray((tiny_run.sample(0)[1] * 255).byte().permute(1, 2, 0).numpy()).save(folder / "hint.png")
    return folder


def test_a_base_stands_for_the_configuration(pipeline):
    sd, hint = pipeline / "sd", pipeline / "hint.png"
    pictures = []
    for arguments in (
        ["--checkpoint", str(sd)],
        ["--checkpoint", str(sd / "controlnet"), "--base", str(sd)],
    ):
        output = pipeline / "out.png"
        words = ["--hint", str(hint), "--prompt", "a cat", "--steps", "2", "--output", str(output), *arguments]
        generate.main(words)
        pictures.append(np.asarray(Image.open(output)))
    assert np.array_equal(*pictures)
    first, text = conditioning.AutoencoderKL(str(sd)), conditioning.CLIPTextEncoder(str(sd))
    frozen = conditioning.Conditioning(first, text, 0.18215)
    parts = controlnet.load(sd)
    latents = ddim(
        ControlledUNet(parts.unet, parts.control).eval(),
        NoiseSchedule(),
        (1, 4, SIZE // 2, SIZE // 2),
        frozen.context(["a cat"]),
        uncond_context=frozen.context([""]),
        hint=tiny_run.sample(0)[1][None],
        guidance_scale=7.5,
        steps=2,
        generator=torch.Generator().manual_seed(0),
    )
    expected = to_uint8(frozen.images(latents))[0].permute(1, 2, 0).numpy()
    assert_same_picture(images_in(pictures[0], 1)[0], expected)


def test_a_nemo_archive_brings_its_configuration(run, tmp_path):  # noqa: F811
    folder, trainer = run
    tensors = load_file(folder / "base.safetensors")
    tensors |= {f"control_model.{name}": tensor for name, tensor in trainer.model.control.state_dict().items()}
    torch.save(tensors, tmp_path / "weights.ckpt")
    model = json.loads(json.dumps(tiny_run.BASE["model"]))
    model["unet_config"]["from_pretrained"] = "/ckpts/of/another/machine.ckpt"
    archive.write(tmp_path / "mine.nemo", tmp_path / "weights.ckpt", json.dumps(model))
    by_archive = command(run, checkpoint=tmp_path / "mine.nemo")
    assert np.array_equal(by_archive, command(run, "--no-average"))

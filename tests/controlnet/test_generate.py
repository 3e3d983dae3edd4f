"""The command line for inference, on a run of a few steps."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from controlnet import build, generate
from controlnet.generate import Request
from controlnet.inference.drawing import diffusers_scheduler
from controlnet.inference.images import fault, grid, to_uint8
from controlnet.inference.sampling import ddim
from tests.controlnet import tiny_run

SIZE = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over a locked base of random weights, with an average, in `run`; the base and a hint lie beside it."""
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    cfg = tiny_run.configuration(folder / "run")
    unet = build.build_model(cfg.model).unet
    for parameter in unet.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05)
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()},
        folder / "base.safetensors",
    )
    options = [f"model.unet_config.from_pretrained={folder}/base.safetensors", "exp_manager.ema.enable=True"]
    trainer = tiny_run.trainer(tiny_run.configuration(folder / "run", *options, "optim.lr=0.05"), awake=False)
    trainer.fit()
    trainer.model.eval()
    Image.fromarray((tiny_run.sample(0)[1] * 255).byte().permute(1, 2, 0).numpy()).save(folder / "hint.png")
    return folder, trainer


def command(run, *arguments, checkpoint=None):
    folder, _ = run
    output = folder / "out.png"
    output.unlink(missing_ok=True)
    usual = {"--checkpoint": str(checkpoint or folder / "run"), "--hint": str(folder / "hint.png")}
    usual |= {} if "--prompts" in arguments else {"--prompt": "red green"}
    words = [word for name, value in usual.items() if name not in arguments for word in (name, value)]
    generate.main([*words, "--steps", "3", "--output", str(output), *arguments])
    return np.asarray(Image.open(output))


def images_in(picture, count, size=SIZE):
    """The images of the second row of a grid with one hint above."""
    top = 4 + 14 + size + 4 + 14
    return [picture[top : top + size, 4 + i * (size + 4) : 4 + i * (size + 4) + size] for i in range(count)]


def expected(run, seed, **kwargs):
    """The image that the trainer's own model draws, without the command line."""
    _, trainer = run
    conditioning = trainer.conditioning
    options = {"uncond_context": conditioning.context([""]), "guidance_scale": 7.5, "steps": 3, **kwargs}
    latents = ddim(
        trainer.model,
        trainer.schedule,
        (1, 12, SIZE // 2, SIZE // 2),
        conditioning.context(["red green"]),
        hint=tiny_run.sample(0)[1][None],
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    return to_uint8(conditioning.images(latents))[0].permute(1, 2, 0).numpy()


def assert_same_picture(picture, other):
    # Batches of other sizes round differently, which can move a pixel by one of 256 levels.
    assert np.abs(picture.astype(int) - other.astype(int)).max() <= 1


def test_grid_holds_the_hint_and_what_the_trained_model_draws(run):
    picture = command(run, "--no-average", "--num-images", "2", "--seed", "5")
    assert np.array_equal(picture[18 : 18 + SIZE, 4 : 4 + SIZE], np.asarray(Image.open(run[0] / "hint.png")))
    first, second = images_in(picture, 2)
    assert_same_picture(first, expected(run, 5))
    assert_same_picture(second, expected(run, 6))
    assert np.abs(first.astype(int) - second).max() > 10


def test_the_average_is_preferred(run):
    _, trainer = run
    with trainer.average.swapped_in():
        averaged = expected(run, 0)
    assert np.abs(averaged.astype(int) - expected(run, 0)).max() > 2
    assert_same_picture(images_in(command(run), 1)[0], averaged)


@pytest.mark.parametrize(
    "arguments, options",
    [
        (["--strength", "0"], {"scales": 0.0}),
        (["--strength", "0.5"], {"scales": 0.5}),
        (["--scales", "0", "0", "0", "0", "1"], None),
        (["--guess-mode"], {"guess_mode": True}),
        (["--guidance-scale", "1"], {"guidance_scale": 1.0}),
        (["--eta", "1"], {"eta": 1.0}),
    ],
)
def test_settings_reach_the_sampler(run, arguments, options):
    if options is None:
        count = len(run[1].model.control.zero_convs) + 1
        arguments = ["--scales", *(["0"] * (count - 1)), "2"]
        options = {"scales": [0.0] * (count - 1) + [2.0]}
    image = images_in(command(run, "--no-average", *arguments), 1)[0]
    assert_same_picture(image, expected(run, 0, **options))
    assert np.abs(image.astype(int) - expected(run, 0)).max() > 2


def test_negative_prompt(run):
    image = images_in(command(run, "--no-average", "--negative-prompt", "blue"), 1)[0]
    uncond = run[1].conditioning.context(["blue"])
    assert_same_picture(image, expected(run, 0, uncond_context=uncond))
    assert np.abs(image.astype(int) - expected(run, 0)).max() > 2


@pytest.mark.parametrize("name", ["DDIM", "UniPC", "Euler"])
def test_schedulers_of_diffusers(run, name):
    pytest.importorskip("diffusers")
    image = images_in(command(run, "--no-average", "--scheduler", name, "--steps", "20"), 1)[0]
    ours = expected(run, 0, steps=20)
    if name == "DDIM":
        assert_same_picture(image, ours)
    else:
        assert image.std() > 5 and np.abs(image.astype(int) - ours).max() > 2


def test_precision_and_size(run):
    ours = images_in(command(run, "--no-average"), 1)[0].astype(int)
    low = images_in(command(run, "--no-average", "--precision", "bf16"), 1)[0].astype(int)
    assert 0 < np.abs(low - ours).mean() < 6
    assert command(run, "--size", "32x24").shape == (4 + 2 * (14 + 24 + 4), 32 + 8, 3)


def test_a_weights_file_with_its_configuration(run):
    folder, _ = run
    checkpoint = folder / "run" / "checkpoints" / "step-00000003"
    by_folder = command(run, "--no-average", checkpoint=checkpoint)
    config = ["--config", str(checkpoint / "config.yaml")]
    by_file = command(run, *config, checkpoint=checkpoint / "control.safetensors")
    assert np.array_equal(by_file, by_folder)
    # One file with everything, and a configuration that names no base.
    whole = load_file(folder / "base.safetensors") | load_file(checkpoint / "control.safetensors")
    save_file(whole, folder / "whole.safetensors")
    by_whole = command(run, *config, "model.unet_config.from_pretrained=null", checkpoint=folder / "whole.safetensors")
    assert np.array_equal(by_whole, by_folder)


class TestRefused:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--size", "15x16"], "the hint is 15 x 16 pixels; expected multiples of 2, such as 16 x 16"),
            (["--scales", "1", "1"], "scales has 2 values; expected"),
            (["--steps", "2000"], "steps is 2000; expected 1 to 1000"),
            (["--precision", "fp8"], "--precision is 'fp8'; expected one of"),
        ],
    )
    def test_settings(self, run, arguments, message):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            command(run, *arguments)

    def test_hint(self, run, tmp_path):
        (tmp_path / "text.png").write_text("not a picture")
        for path, message in (
            (tmp_path / "text.png", "cannot be read as an image"),
            (tmp_path / "no.png", "No such file"),
        ):
            with pytest.raises(SystemExit, match=f"error: .*{message}"):
                command(run, "--hint", str(path))

    def test_checkpoint(self, run, tmp_path):
        with pytest.raises(SystemExit, match="error: no checkpoint at .*absent"):
            command(run, checkpoint=tmp_path / "absent")
        with pytest.raises(SystemExit, match="error: the folder .* has none of"):
            command(run, checkpoint=tmp_path)
        with pytest.raises(SystemExit, match="which holds no configuration; give one with --config"):
            command(run, checkpoint=run[0] / "base.safetensors")
        config = run[0] / "run" / "checkpoints" / "step-00000003" / "config.yaml"
        with pytest.raises(SystemExit, match="error: .*base.safetensors holds no ControlNet"):
            command(run, "--config", str(config), checkpoint=run[0] / "base.safetensors")

    def test_images_that_show_nothing(self, run, tmp_path):
        base = load_file(run[0] / "base.safetensors")
        base["model.diffusion_model.out.2.bias"].fill_(3e38)
        save_file(base, tmp_path / "broken.safetensors")
        with pytest.raises(SystemExit, match="out.png shows nothing: the sampled latents hold NaN or infinity"):
            command(run, f"model.unet_config.from_pretrained={tmp_path}/broken.safetensors")


def test_fault_names_its_reason():
    good = torch.rand(2, 3, 4, 4) * 2 - 1
    latents = torch.zeros(2, 4, 2, 2)
    assert fault(good, latents) is None
    assert "NaN or infinity: run it in float32" in fault(good.clone().fill_(float("nan")), latents)
    assert "sampled latents hold NaN" in fault(good, latents + float("inf"))
    constant = good.clone()
    constant[1] = -1
    assert fault(constant, latents).startswith("image 1 is constant, -1.00 everywhere")


def test_to_uint8():
    values = torch.tensor([-1.0, 0.0, 1.0, 3.0, float("nan")]).view(1, 1, 1, 5)
    assert to_uint8(values)[0, :, 0].tolist() == [[0, 128, 255, 255, 0]] * 3
    assert to_uint8(values, low=0.0)[0, 0, 0].tolist() == [0, 0, 255, 255, 0]


def test_grid_places_rows_of_different_sizes():
    rows = {"a": torch.full((1, 3, 5, 6), 7, dtype=torch.uint8), "b": torch.full((3, 3, 4, 4), 9, dtype=torch.uint8)}
    picture = np.asarray(grid(rows))
    assert picture.shape == (4 + 14 + 5 + 4 + 14 + 4 + 4, 3 * 8 + 4, 3)
    assert (picture[18:23, 4:10] == 7).all() and (picture[41:45, 20:24] == 9).all()


def test_scheduler_names():
    with pytest.raises(ValueError, match="scheduler is 'PNDM'; expected one of DDIM, UniPC, Euler"):
        diffusers_scheduler("PNDM", None)
    assert Request("a").scheduler is None

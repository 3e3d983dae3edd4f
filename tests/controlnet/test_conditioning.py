"""First and condition stages against diffusers and transformers, and the contract of `Conditioning`."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTokenizer

from controlnet.checkpoints import CheckpointError
from controlnet.conditioning import AutoencoderKL, CLIPTextEncoder, Conditioning, SpaceToDepth, WordEmbedder
from tests.controlnet import tiny

WORDS = ["red", "green", "house"]
TINY_VAE = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4}


def small(factor: int = 4, scale_factor: float = 1.0, **options) -> Conditioning:
    return Conditioning(SpaceToDepth(factor), WordEmbedder(WORDS, dim=6, max_length=4), scale_factor, **options)


def images(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Conditioning


@pytest.mark.parametrize("scale_factor", [1.0, 0.25])
def test_space_to_depth_is_lossless(scale_factor):
    conditioning, x = small(4, scale_factor), images(2, 3, 8, 12)
    latents = conditioning.latents(x)
    assert latents.shape == (2, 48, 2, 3) and conditioning.factor == 4 and conditioning.latent_channels == 48
    assert torch.equal(conditioning.images(latents), x)
    # channel c * 16 + row * 4 + column of a latent is that pixel of the square
    assert torch.equal(latents[:, 16 + 4 * 2 + 3, 1, 2], scale_factor * x[:, 1, 4 + 2, 8 + 3])


def test_frozen_evaluated_and_without_gradients(tmp_path):
    tiny.vae().save_pretrained(tmp_path)
    conditioning = Conditioning(AutoencoderKL(str(tmp_path)), WordEmbedder(WORDS, 6, 4))
    conditioning.train()
    assert not any(module.training for module in conditioning.modules())
    assert not any(parameter.requires_grad for parameter in conditioning.parameters())
    x = images(1, 3, 8, 8).requires_grad_()
    for tensor in (conditioning.latents(x), conditioning.context(["red"]), conditioning.images(torch.ones(1, 4, 4, 4))):
        assert not tensor.requires_grad


def test_images_are_clamped():
    conditioning = small(1)
    assert conditioning.images(torch.full((1, 3, 2, 2), 7.0)).unique().tolist() == [1.0]


def test_autocast_outside_does_not_change_the_precision(tmp_path):
    tiny.vae().save_pretrained(tmp_path)
    conditioning, x = Conditioning(AutoencoderKL(str(tmp_path)), WordEmbedder(WORDS, 6, 4)), images(1, 3, 8, 8)
    outside = conditioning.latents(x, torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conditioning.latents(x, torch.Generator().manual_seed(1)), outside)


@pytest.mark.parametrize("precision", ["bf16", "fp16", 32])
def test_each_stage_has_the_precision_asked_for_and_answers_in_float32(tmp_path, precision):
    tiny.vae().save_pretrained(tmp_path / "vae")
    tiny.clip_folder(tmp_path / "clip")
    conditioning = Conditioning(
        AutoencoderKL(str(tmp_path / "vae"), precision=precision),
        CLIPTextEncoder(str(tmp_path / "clip"), max_length=8, precision=precision),
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, 32: torch.float32}[precision]
    vae, text = conditioning.first_stage.vae, conditioning.cond_stage
    for part in (vae.encoder, vae.quant_conv, text):
        assert {parameter.dtype for parameter in part.parameters()} == {dtype}
    for part in (vae.decoder, vae.post_quant_conv):  # see the test below
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    latents = conditioning.latents(images(1, 3, 8, 8))
    assert latents.dtype == conditioning.images(latents).dtype == conditioning.context(["a"]).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_text_encoder_s_attention_is_one_causal_operation(tmp_path, precision):
    """PyTorch's own in the stage's precision, with no mask or scores in memory; a word changes those after it alone."""
    tiny.clip_folder(tmp_path)
    text = CLIPTextEncoder(str(tmp_path), max_length=8, precision=precision)
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append((function.name(), args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    with Calls():
        states = text(text.tokenize(["a cat"]))
    attention = [(args, kwargs) for name, args, kwargs in called if "scaled_dot_product" in name]
    assert len(attention) == text.encoder.config.num_hidden_layers
    for args, kwargs in attention:
        assert args[0].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert True in args[3:] and kwargs.get("attn_mask") is None  # is_causal
    assert not any("softmax" in name or name.startswith(("aten::bmm", "aten::baddbmm")) for name, _, _ in called)
    other = text(text.tokenize(["a bat"]))
    assert torch.equal(states[:, :2], other[:, :2]) and not torch.equal(states[:, 2:], other[:, 2:])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_pictures_are_decoded_in_float32(tmp_path, precision):
    """Activations beyond float16, as Stable Diffusion's decoder has them, make a picture of NaN there."""
    vae = tiny.vae()
    with torch.no_grad():  # one large layer, and the next one takes it back
        vae.decoder.conv_in.weight.mul_(1e6)
        vae.decoder.conv_in.bias.mul_(1e6)
    vae.save_pretrained(tmp_path)
    latents = torch.randn(1, 4, 4, 4)
    low = Conditioning(AutoencoderKL(str(tmp_path), precision=precision), WordEmbedder(WORDS, 6, 4))
    full = Conditioning(AutoencoderKL(str(tmp_path)), WordEmbedder(WORDS, 6, 4))
    assert torch.equal(low.images(latents), full.images(latents)) and full.images(latents).std() > 0.01
    if precision == "fp16":
        assert not torch.isfinite(vae.half().decode(latents.half()).sample).all()


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3, 8, 8), [r"\[3, 8, 8\]", r"\[N, 3, H, W\]"]),
        (torch.zeros(1, 4, 8, 8), [r"\[1, 4, 8, 8\]"]),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["uint8", r"\[-1, 1\]"]),
        (torch.zeros(1, 3, 8, 10), ["8x10", "multiples of the first stage's 4"]),
    ],
)
def test_images_of_another_kind_are_an_error(x, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        small(4).latents(x)


def test_latents_and_captions_of_another_kind_are_an_error():
    with pytest.raises(ValueError, match=r"\[1, 4, 2, 2\].*\[N, 48, h, w\]"):
        small(4).images(torch.zeros(1, 4, 2, 2))
    with pytest.raises(TypeError, match="'red'.*list"):
        small().context("red")


# AutoencoderKL


def reference_latents(model, x, seed):
    posterior = model.encode(x).latent_dist
    return posterior.mean + posterior.std * torch.randn(
        posterior.mean.shape, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("kind", ["folder", "pipeline", "safetensors", "bin", "whole checkpoint"])
@torch.no_grad()
def test_vae_is_the_library_s(tmp_path, kind):
    theirs, x, path = tiny.vae(), images(2, 3, 8, 12), tmp_path
    if kind in ("folder", "pipeline"):
        theirs.save_pretrained(tmp_path / "vae")
        path = tmp_path / "vae" if kind == "folder" else tmp_path
    elif kind == "bin":
        path = tmp_path / "vae.bin"
        torch.save(theirs.state_dict(), path)
    elif kind == "safetensors":
        path = tmp_path / "vae.safetensors"
        save_file(theirs.state_dict(), path)
    else:
        path = tmp_path / "sd.safetensors"
        save_file({f"first_stage_model.{name}": tensor for name, tensor in theirs.state_dict().items()}, path)
    ours = AutoencoderKL(str(path), ddconfig=TINY_VAE)
    conditioning = Conditioning(ours, WordEmbedder(WORDS, 6, 4), scale_factor=0.18215)
    assert ours.factor == 2 and ours.latent_channels == 4
    latents = conditioning.latents(x, torch.Generator().manual_seed(3))
    expected = 0.18215 * reference_latents(theirs, x, 3)
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)
    decoded = theirs.decode(latents / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(conditioning.images(latents), decoded, rtol=1e-6, atol=1e-6)


def test_vae_draws_from_the_posterior_by_the_generator(tmp_path):
    tiny.vae().save_pretrained(tmp_path)
    conditioning, x = Conditioning(AutoencoderKL(str(tmp_path)), WordEmbedder(WORDS, 6, 4)), images(1, 3, 8, 8)
    first, again, other = (conditioning.latents(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_default_architecture_is_stable_diffusion_s():
    with torch.device("meta"):
        ours = AutoencoderKL()
    assert ours.factor == 8
    assert sum(parameter.numel() for parameter in ours.parameters()) == 83_653_863


def test_bad_vae_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*vae file or folder"):
        AutoencoderKL("nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        AutoencoderKL(str(tmp_path))
    save_file(tiny.vae().state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.weight is \[32, 3, 3, 3\], expected \[64, 3, 3, 3\]"):
        AutoencoderKL(str(tmp_path / "vae.safetensors"), ddconfig={**TINY_VAE, "ch": 64})
    with pytest.raises(ValueError, match=r"attn_resolutions is \[16\]"):
        AutoencoderKL(ddconfig={**TINY_VAE, "attn_resolutions": [16]})
    with pytest.raises(ValueError, match=r"ddconfig\.ch_mlt is not a known key; the nearest is ddconfig\.ch_mult"):
        AutoencoderKL(ddconfig={"ch_mlt": [1, 2]})
    with pytest.raises(ValueError, match="z_channels is 4; expected embed_dim, 8"):
        AutoencoderKL(ddconfig=TINY_VAE, embed_dim=8)


# CLIPTextEncoder

CAPTIONS = ["a cat", "cat at bat " * 9, ""]


@pytest.fixture
def clip(tmp_path):
    model = tiny.clip_folder(tmp_path / "clip")
    ids = CLIPTokenizer.from_pretrained(tmp_path / "clip", local_files_only=True)(
        CAPTIONS, truncation=True, max_length=8, padding="max_length", return_tensors="pt"
    )["input_ids"]
    return tmp_path / "clip", model, ids


@torch.no_grad()
def test_clip_last_layer_is_the_library_s(clip):
    folder, model, ids = clip
    conditioning = Conditioning(SpaceToDepth(4), CLIPTextEncoder(str(folder), max_length=8))
    context = conditioning.context(CAPTIONS)
    assert context.shape == (3, 8, 16) and conditioning.context_dim == 16
    torch.testing.assert_close(context, model(input_ids=ids).last_hidden_state, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_clip_penultimate_and_hidden_layers(clip):
    folder, model, ids = clip
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    penultimate = CLIPTextEncoder(str(folder), max_length=8, layer="penultimate")(CAPTIONS)
    torch.testing.assert_close(penultimate, model.final_layer_norm(hidden[-2]), rtol=1e-6, atol=1e-6)
    second = CLIPTextEncoder(str(folder), max_length=8, layer="hidden", layer_idx=1)(CAPTIONS)
    torch.testing.assert_close(second, hidden[1], rtol=1e-6, atol=1e-6)


def test_clip_from_a_pipeline_folder(clip, tmp_path):
    folder, model, _ = clip
    pipeline = tmp_path / "pipeline"
    model.save_pretrained(pipeline / "text_encoder")
    (pipeline / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (pipeline / "tokenizer" / name).write_bytes((folder / name).read_bytes())
    one, two = (CLIPTextEncoder(str(path), max_length=8)(CAPTIONS) for path in (folder, pipeline))
    assert torch.equal(one, two)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["transformer.text_model.", "transformer."])
def test_clip_weights_of_a_whole_checkpoint(clip, tmp_path, prefix):
    folder, model, ids = clip
    for parameter in model.parameters():
        parameter.mul_(1.5)
    tensors = {f"cond_stage_model.{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    tensors[f"cond_stage_model.{prefix}embeddings.position_ids"] = torch.arange(12)[None]
    save_file(tensors, tmp_path / "sd.safetensors")
    ours = CLIPTextEncoder(str(folder), max_length=8, from_pretrained=str(tmp_path / "sd.safetensors"))
    torch.testing.assert_close(ours(CAPTIONS), model(input_ids=ids).last_hidden_state, rtol=1e-6, atol=1e-6)
    del tensors[f"cond_stage_model.{prefix}final_layer_norm.bias"]
    save_file(tensors, tmp_path / "sd.safetensors")
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias"):
        CLIPTextEncoder(str(folder), max_length=8, from_pretrained=str(tmp_path / "sd.safetensors"))


def test_bad_clip_arguments(clip, tmp_path):
    folder, _, _ = clip
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        CLIPTextEncoder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="max_length is 77; expected 1 to 12"):
        CLIPTextEncoder(str(folder))
    for options in ({"layer": "pooled"}, {"layer": "hidden"}, {"layer_idx": 1}):
        with pytest.raises(ValueError, match="layer is"):
            CLIPTextEncoder(str(folder), max_length=8, **options)


# WordEmbedder


def test_words_become_rows_of_the_table():
    embedder = WordEmbedder(WORDS, dim=6, max_length=4)
    assert embedder.tokenize(["Red, green!", "a red house in the wood", ""]).tolist() == [
        [2, 3, 0, 0],
        [1, 2, 4, 1],
        [0, 0, 0, 0],
    ]
    context = embedder(["red house", "house red"])
    assert context.shape == (2, 4, 6) and embedder.context_dim == 6
    table, position = embedder.embedding.weight, embedder.position.weight
    assert torch.equal(context[0, 1], table[4] + position[1])
    assert not torch.equal(context[0], context[1]), "the order of words must show"


def test_the_random_table_is_the_same_one_each_time_and_a_checkpoint_replaces_it(tmp_path):
    first, second = WordEmbedder(WORDS, 6, 4), WordEmbedder(WORDS, 6, 4)
    assert torch.equal(first(["red"]), second(["red"]))
    tensors = {f"cond_stage_model.{name}": 2 * tensor for name, tensor in first.state_dict().items()}
    save_file(tensors, tmp_path / "base.safetensors")
    loaded = WordEmbedder(WORDS, 6, 4, from_pretrained=str(tmp_path / "base.safetensors"))
    assert torch.equal(loaded(["red"]), 2 * first(["red"]))
    with pytest.raises(CheckpointError, match=r"embedding\.weight is \[5, 6\], expected \[4, 6\]"):
        WordEmbedder(WORDS[:2], 6, 4, from_pretrained=str(tmp_path / "base.safetensors"))


@pytest.mark.parametrize("vocabulary", [[], ["red", "red"], ["two words"], ["Red"]])
def test_bad_vocabulary(vocabulary):
    with pytest.raises(ValueError, match="vocabulary has"):
        WordEmbedder(vocabulary, 6, 4)


def test_bad_space_to_depth():
    with pytest.raises(ValueError, match="factor is 0"):
        SpaceToDepth(0)


@pytest.mark.parametrize(("package", "call"), [("diffusers", "AutoencoderKL()"), ("transformers", "CLIPTextEncoder()")])
def test_without_the_library_the_message_says_what_to_install(package, call):
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from controlnet.conditioning import AutoencoderKL, CLIPTextEncoder\n"
        f"try: {call}\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"{package} is not installed" in done.stdout and f"pip install {package}, or" in done.stdout

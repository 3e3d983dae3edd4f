"""The U-Net against diffusers': every kind of block, gradients, options, bad input."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from controlnet.model.layers import TimestepEmbedding
from controlnet.model.transformer import AttentionBlock
from controlnet.model.unet import UNet
from tests.controlnet import twins
from tests.controlnet.twins import BASE, CASES, assert_same, randomise

SMALL = BASE | {"out_channels": 4}
LATENT = [4, 4, 6]
WITHOUT_TRANSFORMER = {"use_spatial_transformer": False, "context_dim": None}


def small_inputs(n: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, *LATENT, dtype=dtype), torch.tensor([999, 3])[:n], torch.randn(n, 7, 24, dtype=dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_diffusers(case):
    ours, theirs = twins.unet_pair(case)
    x, timesteps, context, _ = twins.inputs(case)
    got = ours(x, timesteps, context)
    upstream = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, [x, context], upstream, retain_graph=True)
    got.backward(upstream)

    want = theirs(x, timesteps, context).sample
    want_grads = torch.autograd.grad(want, [x, context], upstream, retain_graph=True)
    want.backward(upstream)
    assert_same(got, want)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert_same(got_grad, want_grad)
    twins.assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("only_mid_control", [False, True])
@pytest.mark.parametrize("name", ["sd15", "odd sizes, blocks per level, depth 2"])
def test_control_equals_diffusers(name, only_mid_control):
    case = CASES[name]
    ours, theirs = twins.unet_pair(case)
    x, timesteps, context, _ = twins.inputs(case)
    h, skips = ours.encode(x, timesteps, context)
    control = [torch.randn_like(t) for t in [*skips, h]]
    before = list(control)
    got = ours(x, timesteps, context, control, only_mid_control)
    assert all(a is b for a, b in zip(control, before, strict=True)), "control was consumed"

    down = [torch.zeros_like(t) if only_mid_control else t for t in control[:-1]]
    want = theirs(
        x, timesteps, context, down_block_additional_residuals=down, mid_block_additional_residual=control[-1]
    ).sample
    assert_same(got, want)
    assert_same(ours.decode(h, skips, control, timesteps, context, only_mid_control=only_mid_control), want)
    assert (got - ours(x, timesteps, context)).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{}, WITHOUT_TRANSFORMER], ids=["transformer", "attention block"])
def test_what_starts_at_zero(changes):
    """The last layer of every residual branch, and of the whole: an untrained U-Net answers with zero."""
    unet = UNet(**SMALL | changes)
    zero = {name for name, p in unet.named_parameters() if p.dim() > 1 and not p.any()}
    last = (".out_layers.3.weight", ".proj_out.weight", "out.2.weight")
    assert zero == {name for name in unet.state_dict() if name.endswith(last)}
    assert not unet(*small_inputs()).any()


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block_equals_diffusers(new_order, flash):
    """diffusers keeps q, k and v apart; the original packs them head by head, or (new order) all q, all k, all v."""
    from diffusers.models.attention_processor import Attention

    channels, heads = 96, 3
    ours = randomise(AttentionBlock(channels, heads, new_order=new_order, use_flash_attention=flash).double())
    theirs = Attention(channels, heads=heads, dim_head=channels // heads, norm_num_groups=32, bias=True, eps=1e-5,
                       residual_connection=True, _from_deprecated_attn_block=True).double()  # fmt: skip
    state = ours.state_dict()
    assert state["qkv.weight"].shape == (3 * channels, channels, 1)
    packed = {
        "group_norm.weight": state["norm.weight"],
        "group_norm.bias": state["norm.bias"],
        "to_out.0.weight": state["proj_out.weight"].squeeze(2),
        "to_out.0.bias": state["proj_out.bias"],
    }
    for kind in ("weight", "bias"):
        rows = state[f"qkv.{kind}"]
        parts = rows.chunk(3) if new_order else rows.unflatten(0, (heads, 3, -1)).unbind(1)
        for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
            packed[f"{name}.{kind}"] = part.reshape(channels, *[channels] * (kind == "weight"))
    theirs.load_state_dict(packed)

    x = torch.randn(2, channels, 3, 5, dtype=torch.float64, requires_grad=True)
    got, want = ours(x), theirs(x)
    assert_same(got, want)
    upstream = torch.randn_like(got)
    assert_same(torch.autograd.grad(got, x, upstream)[0], torch.autograd.grad(want, x, upstream)[0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_prepared_inputs_change_nothing(case):
    """The context's keys and values in the place of the context, at several timesteps."""
    ours, _ = twins.unet_pair(case)
    x, _, context, _ = twins.inputs(case)
    prepared = ours.prepare_context(context)
    for timestep in (999, 20):
        timesteps = torch.tensor(timestep).expand(len(x))
        got = ours(x, timesteps, prepared, embedding=ours.embed(timesteps))
        assert_same(got, ours(x, timesteps, context))


def test_without_spatial_transformer():
    """Attention blocks inside a U-Net: heads of encoder and decoder, and no context."""
    params = {k: v for k, v in SMALL.items() if k not in ("context_dim", "use_spatial_transformer", "legacy")}
    unet = randomise(UNet(**params, legacy=True, num_heads_upsample=2, num_attention_blocks=[1, 0]))
    blocks = {name: m.heads for name, m in unet.named_modules() if isinstance(m, AttentionBlock)}
    assert blocks == {"input_blocks.1.1": 4, "middle_block.1": 4, "output_blocks.2.1": 2}
    x, timesteps, _ = small_inputs()
    assert (unet(x, timesteps) - unet(x + 1, timesteps)).abs().max() > 0.01


def test_resampling_without_convolution():
    unet = randomise(UNet(**SMALL | {"conv_resample": False}))
    assert not any(".op." in name or ".conv." in name for name in unet.state_dict())
    x, timesteps, context = small_inputs()
    assert unet(x[:, :, :3, :5], timesteps, context).shape == (2, 4, 3, 5)


def test_disable_middle_self_attn():
    """The first attention of the middle block has keys of the context's width."""
    unet = UNet(**SMALL | {"disable_middle_self_attn": True})
    shapes = {name: list(t.shape) for name, t in unet.state_dict().items() if "attn1.to_k" in name}
    assert shapes["middle_block.1.transformer_blocks.0.attn1.to_k.weight"] == [64, 24]
    assert shapes["input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"] == [32, 32]


@pytest.mark.parametrize("transformer", [True, False])
def test_flash_attention_equals_softmax(transformer):
    params = SMALL if transformer else SMALL | WITHOUT_TRANSFORMER
    plain, flash = (randomise(UNet(**params, use_flash_attention=flag).double()) for flag in (False, True))
    x, timesteps, context = small_inputs(dtype=torch.float64)
    assert_same(flash(x, timesteps, context), plain(x, timesteps, context))


@pytest.mark.parametrize("transformer", [True, False])
def test_activation_checkpointing(transformer):
    """The same gradients, dropout included, from fewer saved tensors."""
    params = SMALL | {"dropout": 0.3}
    if not transformer:
        params |= WITHOUT_TRANSFORMER
    x, timesteps, context = small_inputs()
    gradients, saved = [], []
    for use_checkpoint in (False, True):
        unet = randomise(UNet(**params, use_checkpoint=use_checkpoint))
        sizes = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            output = unet(x, timesteps, context)
        output.square().sum().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
        saved.append(sum(sizes))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert saved[1] < saved[0] / 2


def test_dropout_acts_in_training_alone():
    plain, dropping = (randomise(UNet(**SMALL, dropout=p)) for p in (0.0, 0.3))
    inputs = small_inputs()
    assert (dropping(*inputs) - plain(*inputs)).abs().max() > 0.01
    assert torch.equal(dropping.eval()(*inputs), plain(*inputs))


@contextlib.contextmanager
def record_layouts(model: nn.Module, wrong: list[str], memory_format: torch.memory_format):
    def check(name):
        def hook(module, args, output):
            if isinstance(output, torch.Tensor) and output.dim() == 4:
                seen.append(name)
                if not output.is_contiguous(memory_format=memory_format):
                    wrong.append(f"{name} {type(module).__name__}")

        return hook

    seen: list[str] = []
    handles = [module.register_forward_hook(check(name)) for name, module in model.named_modules()]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "changes",
    [{}, WITHOUT_TRANSFORMER, {"resblock_updown": True, "use_scale_shift_norm": True}],
    ids=["transformer", "attention block", "updown"],
)
def test_memory_format_is_kept_by_every_module(changes, memory_format):
    unet = randomise(UNet(**SMALL | changes)).to(memory_format=memory_format)
    x, timesteps, context = small_inputs()
    wrong: list[str] = []
    with record_layouts(unet, wrong, memory_format) as seen:
        output = unet(x.to(memory_format=memory_format), timesteps, context)
    assert len(seen) > 50 and not wrong
    assert output.is_contiguous(memory_format=memory_format)


def test_precision_of_the_timestep_embedding():
    """bfloat16 weights do not round the timestep: in bfloat16, 999 is 1000."""
    embed = randomise(TimestepEmbedding(32, 128)).bfloat16()
    assert embed.frequencies.dtype == torch.float32
    exact = copy.deepcopy(embed).double()
    timesteps = torch.tensor([999, 1000])
    got, want = embed(timesteps), exact(timesteps)
    assert got.dtype == torch.bfloat16
    apart = (want[0] - want[1]).norm()
    assert (got.double() - want).norm(dim=1).max() < 0.2 * apart


def test_frequencies_survive_the_meta_device():
    source = randomise(UNet(**SMALL))
    x, timesteps, context = small_inputs()
    want = source(x, timesteps, context)
    with torch.device("meta"):
        assigned, emptied = UNet(**SMALL), UNet(**SMALL)
    assigned.load_state_dict(source.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(assigned(x, timesteps, context), want)
    assert torch.equal(emptied(x, timesteps, context), want)
    assert torch.equal(copy.deepcopy(source)(x, timesteps, context), want)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    """Weights in bfloat16, or under autocast: near the float32 result, and float32 inputs are cast."""
    unet = randomise(UNet(**SMALL, use_flash_attention=True))
    x, timesteps, context = small_inputs()
    want = unet(x, timesteps, context)
    if not autocast:
        unet.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = unet(x, timesteps, context)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, c: (x[:, :3], t, c), r"x has shape \[2, 3, 4, 6\]; expected \[N, 4, H, W\]"),
        (lambda x, t, c: (x, t[:1], c), r"timesteps has shape \[1\]; expected \[2\]"),
        (lambda x, t, c: (x, t, c[..., 1:]), r"context has shape \[2, 7, 23\]; expected \[2, T, 24\]"),
        (lambda x, t, c: (x, t, c[:1]), r"context has shape \[1, 7, 24\]; expected \[2, T, 24\]"),
        (lambda x, t, c: (x, t, None), "context is None; expected"),
        (lambda x, t, c: (x, t, c, [x]), "control has 1 tensors; expected 5"),
    ],
)
def test_wrong_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**SMALL)(*change(*small_inputs()))

"""Features of diffusers on accelerated models: each gives diffusers' results in float64."""

import contextlib
import copy
import warnings

import diffusers
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

import controlnet
from benchmarks.device_free import OperationCounter
from cnkernels import onednn
from tests.controlnet.diffusers_models import CONTEXT, SMALL, fused, unet
from tests.controlnet.diffusers_models import controlnet as control_model
from tests.controlnet.test_accelerate import X, exact, inputs, step


def a_lora(base):
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_k", "to_q", "to_out.0", "proj", "proj_in"], init_lora_weights=False)
    base.add_adapter(config)
    base.double()
    return {"cross_attention_kwargs": {"scale": 0.7}}


def freeu(base):
    base.enable_freeu(0.9, 0.2, 1.5, 1.6)
    return {}


def a_text_mask(base):
    return {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2)}


def t2i_residuals(base):
    shapes = [(32, X[2:]), (64, (5, 3)), (64, (3, 2)), (64, (2, 1))]
    return {"down_intrablock_additional_residuals": [torch.ones(2, c, *size).double() for c, size in shapes]}


def a_processor(base):
    class Doubled(AttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    base.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Doubled())
    return {}


def a_hook(base):
    base.mid_block.resnets[0].register_forward_hook(lambda module, args, result: result * 2)
    base.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(lambda m, args, y: y * 2)
    return {}


def a_hook_on_a_norm(base):
    base.mid_block.resnets[0].norm1.register_forward_hook(lambda module, args, result: result * 2)
    return {}


def another_forward(base):
    layer = base.mid_block.attentions[0].transformer_blocks[0].attn1
    stock = layer.forward
    layer.forward = lambda *args, **kwargs: 2 * stock(*args, **kwargs)
    return {}


def fused_projections(base):
    base.fuse_qkv_projections()
    return {}


def a_chunked_feed_forward(base):
    for block in base.modules():
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(1, 1)
    return {}


def an_ip_adapter(base):
    torch.manual_seed(0)
    processors = {}
    for name in base.attn_processors:
        width = base.get_submodule(name.rpartition(".")[0]).to_q.in_features
        own = IPAdapterAttnProcessor2_0(hidden_size=width, cross_attention_dim=CONTEXT, num_tokens=(4,))
        processors[name] = own.double() if "attn2" in name else AttnProcessor2_0()
    base.set_attn_processor(processors)
    projection = ImageProjection(cross_attention_dim=CONTEXT, image_embed_dim=16, num_image_text_embeds=4)
    base.encoder_hid_proj = MultiIPAdapterImageProjection([projection]).double()
    base.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 16).double()]}}


# To what is warned of (None: nothing, all of it is served), and how many of the 32 attentions stay fused.
FEATURES = {
    a_lora: (None, 32),
    freeu: (None, 32),
    t2i_residuals: (None, 32),
    a_hook: (None, 32),
    another_forward: (None, 32),
    a_text_mask: ("an attention mask", 16),
    a_processor: ("the attention processor Doubled", 31),
    a_hook_on_a_norm: ("norm1, a GroupNorm with hooks", 32),
    fused_projections: ("the attention processor FusedAttnProcessor2_0", 0),
    a_chunked_feed_forward: ("a feed-forward in chunks", 32),
    an_ip_adapter: ("the attention processor IPAdapterAttnProcessor2_0", 16),
}


def call(base, arguments):
    x, t, context, _ = inputs(torch.float64)
    copied = {name: list(v) if isinstance(v, list) else v for name, v in arguments.items()}
    return base(x, t, context, **copied).sample


@pytest.mark.parametrize("first", ["accelerate", "feature"])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
@torch.no_grad()
def test_feature(feature, first):
    base = unet().double()
    reference = copy.deepcopy(base)
    plain = call(reference, {})
    expected = call(reference, feature(reference))
    assert (expected - plain).abs().max() > 1e-3 or feature in (fused_projections, a_chunked_feed_forward)
    if first == "accelerate":
        arguments = feature(controlnet.accelerate(base))
    else:
        arguments = feature(base)
        controlnet.accelerate(base)
    reason, attentions = FEATURES[feature]
    expectation = pytest.warns(UserWarning, match=reason) if reason else contextlib.nullcontext()
    with fused() as counts, expectation as warned:
        for _ in range(2):
            exact(call(base, arguments), expected)
    if reason:
        assert len([w for w in warned if "fast path" in str(w.message)]) == 1
    wrapped_stock_code = feature is another_forward and first == "feature"
    assert counts["attention"] == 2 * (attentions - wrapped_stock_code)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fast path")  # said once
        exact(call(base, arguments), expected)


@pytest.mark.parametrize("feature", [a_lora, freeu, a_processor], ids=lambda feature: feature.__name__)
@torch.no_grad()
def test_feature_of_a_compiled_model(feature):
    """The guards of compiled code see what the blocks look at."""
    base = unet(**SMALL).double()
    reference = copy.deepcopy(base)
    plain = call(reference, {})
    feature(reference)
    expected = call(reference, {})
    compiled = torch.compile(controlnet.accelerate(base), backend="eager")
    exact(call(compiled, {}), plain)
    feature(base)
    exact(call(compiled, {}), expected)
    assert (expected - plain).abs().max() > 1e-3


@torch.no_grad()
def test_class_embeddings():
    base = unet(class_embed_type="identity", projection_class_embeddings_input_dim=None).double()
    x, t, context, _ = inputs(torch.float64)
    labels = torch.randn(2, 128).double()
    expected = base(x, t, context, class_labels=labels).sample
    controlnet.accelerate(base)
    for _ in range(2):
        exact(base(x, t, context, class_labels=labels).sample, expected)
    exact(base(x, t, context, class_labels=-labels).sample, controlnet.restore(base)(x, t, context, -labels).sample)


@torch.no_grad()
def test_a_replaced_layer_is_called_as_it_is():
    class Tripled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    base = unet().double()
    for place, name in (("attn1", "to_v"), ("attn2", "to_k")):
        attention = base.up_blocks[1].attentions[0].transformer_blocks[0].get_submodule(place)
        layer = getattr(attention, name)
        tripled = Tripled(layer.in_features, layer.out_features, bias=False).double()
        tripled.load_state_dict(layer.state_dict())
        setattr(attention, name, tripled)
    expected = call(base, {})
    exact(call(controlnet.accelerate(base), {}), expected)


@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_dropout_and_checkpointing(variant, checkpointing):
    """The step of diffusers' ControlNet training script: the U-Net frozen, losses and gradients are the same."""

    def train(base, control):
        base.requires_grad_(False)
        control.train()
        if checkpointing:
            base.enable_gradient_checkpointing()
            control.enable_gradient_checkpointing()
        control.mid_block.resnets[0].dropout.p = 0.5
        optimizer = torch.optim.SGD(control.parameters(), lr=1e-3)
        losses = []
        for seed in range(3):
            torch.manual_seed(seed)
            loss = step(base, control, torch.float64).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    base = unet(variant).double()
    control = control_model(base).double()
    for net in (base, control):
        net.to(memory_format=torch.channels_last)  # dropout draws in the order of memory
    copies = copy.deepcopy((base, control))
    expected = train(base, control)
    with fused() as counts, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fast path")
        exact(train(*map(controlnet.accelerate, copies)), expected, 1e-10)
    assert counts["attention"] > 60 and counts["group_norm_silu"] > 60
    assert len(set(expected.tolist())) == 3


def test_saved_bytes_of_a_training_step():
    """At most 0.75 of diffusers', without checkpointing."""

    def saved(base, control):
        own = {p.untyped_storage()._cdata for net in (base, control) for p in net.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step(base, control).square().mean()
        return sum(storage.nbytes() for storage in kept.values())

    base = unet().requires_grad_(False)
    control = control_model(base).train()
    theirs = saved(base, control)
    assert saved(*map(controlnet.accelerate, (base, control))) <= 0.75 * theirs


@pytest.mark.skipif(not onednn.serves(torch.zeros(1)), reason="elsewhere a residual is an addition of its own")
@pytest.mark.parametrize("variant, most", [("sd15", 0.65), ("sdxl", 0.67)])  # more of XL's are attention's projections
@torch.no_grad()
def test_operations_of_a_first_step(variant, most):
    """As a share of diffusers', views left out. Nothing is kept where a mode looks on, as at a first step."""

    def operations(*both):
        with OperationCounter() as counter:
            step(*both)
        return sum(counter.counts.values())

    base = unet(variant)
    control = control_model(base)
    theirs = operations(base, control)
    assert operations(*map(controlnet.accelerate, (base, control))) <= most * theirs


def test_a_multi_controlnet_and_a_pipeline_share_models():
    base = unet()
    net = control_model(base)
    multi = diffusers.MultiControlNetModel([net, net])
    controlnet.accelerate(multi)
    hooks = dict(net._forward_hooks)
    controlnet.accelerate(net)
    assert net._forward_hooks == hooks
    controlnet.restore(net)
    assert not net._forward_hooks and not net._forward_pre_hooks

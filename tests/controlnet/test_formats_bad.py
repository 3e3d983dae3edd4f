"""Files that cannot be used: one error that says what and why, nothing run, and nothing left behind."""

import io
import os
import tarfile

import pytest
import torch
from safetensors.torch import save_file

import controlnet
from controlnet import CheckpointError, checkpoints
from controlnet.checkpoints import write
from tests.controlnet.formats import original, save, to_nemo

PREFIX = "control_model."


def refused(tmp_path, source, pattern, *, format="original"):
    """Neither loads nor converts, with an error of the pattern; and the folder of the target stays empty."""
    with pytest.raises(CheckpointError, match=pattern):
        controlnet.load(source)
    target = tmp_path / "target"
    target.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match=pattern):
        controlnet.convert(source, target / "x.safetensors", format)
    assert list(target.iterdir()) == []


@pytest.fixture
def tensors(tmp_path):
    return original("control", folder=tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.nemo"])
def test_a_cut_off_file(tmp_path, tensors, name, keep):
    whole = tmp_path / name
    controlnet.convert(save(tensors, tmp_path / "s.safetensors"), whole, "nemo")
    content = whole.read_bytes()
    if name == "x.nemo" and keep == -1:
        keep = len(content) // 2  # the last bytes of a tar file are padding
    whole.write_bytes(content[:keep])
    refused(tmp_path, whole, r"damaged|refused|cut off")


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.nemo", "x.zip"])
def test_a_foreign_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>404: not found</html>" * 40)
    refused(tmp_path, tmp_path / name, r"damaged|refused|suffix")


def test_a_foreign_model_and_no_file(tmp_path):
    save({"layer4.conv.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    refused(tmp_path, tmp_path / "x.safetensors", r"no known layout.*layer4\.conv")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        controlnet.load(tmp_path / "nowhere.safetensors")


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", r"has none of diffusion_pytorch_model\.safetensors")


@pytest.mark.parametrize("gone", ["input_blocks.0.0.weight", "middle_block.0.in_layers.2.weight", "zero_convs.1.0.bias",
                                  "input_hint_block.0.weight"])  # fmt: skip
def test_a_missing_tensor(tmp_path, tensors, gone):
    tensors[PREFIX + gone.replace("b", "q")] = tensors.pop(PREFIX + gone)
    refused(tmp_path, save(tensors, tmp_path / "x.safetensors"), rf"lacks .*{gone}")


def test_a_missing_tensor_names_the_nearest(tmp_path, tensors):
    tensors[PREFIX + "middle_block.0.in_layers.2.wieght"] = tensors.pop(PREFIX + "middle_block.0.in_layers.2.weight")
    source = save(tensors, tmp_path / "x.safetensors")
    refused(tmp_path, source, r"lacks 1 of \d+ .*nearest in the file: middle_block\.0\.in_layers\.2\.wieght")


def test_a_tensor_too_many(tmp_path, tensors):
    tensors[PREFIX + "zero_convs.0.0.wieght"] = torch.ones(2)
    source = save(tensors, tmp_path / "x.safetensors")
    refused(tmp_path, source, r"1 tensors more .*zero_convs\.0\.0\.wieght .nearest in the model: zero_convs\.0\.0\.wei")


def test_one_tensor_of_another_width(tmp_path, tensors):
    tensors[PREFIX + "middle_block.0.in_layers.2.weight"] = torch.ones(64, 32, 3, 3)
    source = save(tensors, tmp_path / "x.safetensors")
    refused(tmp_path, source, r"middle_block\.0\.in_layers\.2\.weight is \[64, 32, 3, 3\], expected \[64, 64, 3, 3\]")


def test_a_level_of_another_width(tmp_path, tensors):
    tensors[PREFIX + "input_blocks.3.0.in_layers.2.weight"] = torch.ones(50, 32, 3, 3)
    refused(tmp_path, save(tensors, tmp_path / "x.safetensors"), r"level 1 is 50 wide; expected a multiple of .* 32")


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (32, 0, 3, 3), (32,)])
def test_a_first_convolution_of_nothing(tmp_path, tensors, shape):
    tensors[PREFIX + "input_blocks.0.0.weight"] = torch.ones(shape)
    refused(tmp_path, save(tensors, tmp_path / "x.safetensors"), r"input_blocks\.0\.0\.weight is \[.*none of them 0")


def test_heads_that_do_not_divide(tmp_path, tensors):
    source = save(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"num_heads is 5; expected a divisor of 32"):
        controlnet.load(source, num_heads=5)


def test_mixed_layouts(tmp_path, tensors):
    tensors[PREFIX + "down_blocks.0.resnets.0.norm1.weight"] = torch.ones(32)
    refused(tmp_path, save(tensors, tmp_path / "x.safetensors"), "two layouts in one file")


def test_linear_and_convolution_mixed(tmp_path, tensors):
    name = PREFIX + "input_blocks.1.1.proj_in.weight"
    tensors[name] = tensors[name][:, :, 0, 0].contiguous()
    refused(tmp_path, save(tensors, tmp_path / "x.safetensors"), r"mixes linear .*input_blocks\.1\.1\.proj_in\.weight")


def test_classes_by_number_are_refused_by_name(tmp_path):
    tensors = original("unet", folder=tmp_path) | {"model.diffusion_model.label_emb.weight": torch.ones(4, 4)}
    refused(tmp_path, save(tensors, tmp_path / "x.safetensors"), r"label_emb\.weight.*class embeddings")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"act_fn": "gelu"}, r"act_fn is 'gelu' in config\.json; expected 'silu'"),
        ({"global_pool_conditions": True}, r"global_pool_conditions is True"),
        ({"attention_head_dim": [2, 8], "block_out_channels": [32, 64]}, r"attention_head_dim is \[2, 8\]"),
    ],
)
def test_a_config_json_that_asks_for_something_else(tmp_path, tensors, change, pattern):
    import json

    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "d", "diffusers")
    path = tmp_path / "d" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(tmp_path, tmp_path / "d", pattern)


def test_several_controlnets_in_a_pipeline_folder(tmp_path, tensors):
    controlnet.convert(save(tensors, tmp_path / "x.safetensors"), tmp_path / "p" / "controlnet", "diffusers")
    controlnet.convert(tmp_path / "x.safetensors", tmp_path / "p" / "controlnet_1", "diffusers")
    refused(tmp_path, tmp_path / "p", r"several ControlNets: controlnet, controlnet_1")


# pickles and archives


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def archive(path, members):
    """A tar file of (TarInfo, bytes)."""
    with tarfile.open(path, "w") as tar:
        for header, content in members:
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def pickled(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin", "x.nemo"])
def test_a_pickle_with_a_payload_is_not_run(tmp_path, tensors, name):
    sign = tmp_path / "it-ran"
    content = pickled({"state_dict": tensors, "callbacks": Payload(str(sign))})
    if name == "x.nemo":
        archive(tmp_path / name, [(tarfile.TarInfo("./model_weights.ckpt"), content)])
    else:
        (tmp_path / name).write_bytes(content)
    refused(tmp_path, tmp_path / name, r"refused: it asks to load posix\.mkdir")
    assert not sign.exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil"])
def test_an_archive_with_a_name_outside_it_is_refused(tmp_path, tensors, name):
    members = [(tarfile.TarInfo("model_weights.ckpt"), pickled(to_nemo(tensors))), (tarfile.TarInfo(name), b"x")]
    refused(tmp_path, archive(tmp_path / "x.nemo", members), "would leave the archive's folder")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_an_archive_with_a_link_or_device_is_refused(tmp_path, kind):
    header = tarfile.TarInfo("model_weights.ckpt")
    header.type, header.linkname = kind, "/etc/passwd"
    refused(tmp_path, archive(tmp_path / "x.nemo", [(header, b"")]), "a link or a device")


@pytest.mark.parametrize("names", [[], ["mp_rank_00/model_weights.ckpt", "mp_rank_01/model_weights.ckpt"]])
def test_an_archive_without_one_set_of_weights_is_refused(tmp_path, names):
    members = [(tarfile.TarInfo(name), b"x") for name in ["model_config.yaml", *names]]
    refused(tmp_path, archive(tmp_path / "x.nemo", members), rf"has {len(names)} members model_weights\.ckpt")


def test_a_compressed_archive_of_older_releases(tmp_path, tensors):
    with tarfile.open(tmp_path / "x.nemo", "w:gz") as tar:
        content = pickled(to_nemo(tensors))
        header = tarfile.TarInfo("./model_weights.ckpt")
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))
    assert checkpoints.read(tmp_path / "x.nemo").keys() == to_nemo(tensors).keys()


# targets


@pytest.mark.parametrize(
    ("name", "format"),
    [("x.gguf", "original"), ("x", "original"), ("x.nemo", "original"), ("x.ckpt", "diffusers"),
     ("x.nemo", "diffusers"), ("x", "nemo")],
)  # fmt: skip
def test_a_suffix_that_does_not_fit(tmp_path, tensors, name, format):
    with pytest.raises(ValueError, match=r"dst is .*; expected a (file with the suffix|new folder).* for the format"):
        controlnet.convert(save(tensors, tmp_path / "s.safetensors"), tmp_path / "t" / name, format)
    assert not (tmp_path / "t").exists()


def test_an_unknown_format(tmp_path, tensors):
    with pytest.raises(ValueError, match=r"format is 'onnx'; expected one of original, diffusers, nemo, nemo-1\.23"):
        controlnet.convert(save(tensors, tmp_path / "s.safetensors"), tmp_path / "x.safetensors", "onnx")


@pytest.mark.parametrize("format", ["original", "diffusers", "nemo"])
def test_a_conversion_that_fails_midway_leaves_what_was_there(tmp_path, tensors, format, monkeypatch):
    source = save(original("unet", "control", folder=tmp_path), tmp_path / "s.safetensors")
    target = tmp_path / "t" / {"original": "x.safetensors", "diffusers": "x", "nemo": "x.nemo"}[format]
    target.parent.mkdir()
    if format != "diffusers":
        target.write_bytes(b"before")

    def full_disk(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(write, "_save_safetensors", full_disk)
    monkeypatch.setattr(write.archive, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        controlnet.convert(source, target, format)
    assert list(target.parent.iterdir()) == ([] if format == "diffusers" else [target])
    assert format == "diffusers" or target.read_bytes() == b"before"


def test_a_file_is_replaced_by_its_own_conversion(tmp_path, tensors):
    source = save(tensors, tmp_path / "x.safetensors")
    controlnet.convert(source, source, "nemo")
    assert checkpoints.read(source).keys() == to_nemo(tensors).keys()


def test_several_parts_do_not_fit_one_diffusers_file(tmp_path):
    source = save(original("unet", "control", folder=tmp_path), tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match=r"expected one part for the one file"):
        controlnet.convert(source, tmp_path / "x.safetensors", "diffusers")


def test_what_has_no_place_is_left_out_and_said(tmp_path, tensors):
    from tests.controlnet.formats import PREFIXES

    openclip = {PREFIXES["cond_stage"] + "model.ln_final.weight": torch.ones(4)}
    save_file(tensors | openclip | {"betas": torch.ones(2)}, tmp_path / "x.safetensors")
    report = controlnet.convert(tmp_path / "x.safetensors", tmp_path / "x", "diffusers")
    assert sorted(report.left_out) == ["betas", *openclip] and report.written == {"control": len(tensors)}
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_transfer_and_add_control_say_what_is_missing(tmp_path, tensors):
    control = save(tensors, tmp_path / "c.safetensors")
    base = save(original("unet", folder=tmp_path), tmp_path / "b.safetensors")
    wide = save(original("unet", folder=tmp_path, model_channels=64), tmp_path / "w.safetensors")
    deep = save(original("unet", folder=tmp_path, num_res_blocks=2), tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match=r"c\.safetensors holds control; expected a U-Net"):
        controlnet.transfer(control, control, base)
    with pytest.raises(CheckpointError, match=r"b\.safetensors holds unet; expected a ControlNet"):
        controlnet.transfer(base, base, base)
    with pytest.raises(CheckpointError, match=r"has the shapes \[32.*\[32.*\[64"):
        controlnet.transfer(control, base, wide)
    with pytest.raises(CheckpointError, match=r"d\.safetensors lacks \d+ tensors of .*c\.safetensors's encoder"):
        controlnet.transfer(control, deep, base)
    with pytest.raises(CheckpointError, match="expected a U-Net"):
        controlnet.add_control(control)
    both = save(tensors | original("unet", folder=tmp_path), tmp_path / "both.safetensors")
    with pytest.raises(CheckpointError, match="holds a ControlNet already"):
        controlnet.add_control(both)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", r"is a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", r"is a LoRA"),
        ("lllite_unet_input_blocks_4_1.down.0.weight", "is a ControlNet-LLLite"),
        ("adapter.body.0.resnets.0.block1.weight", "is a T2I-Adapter"),
        ("image_proj.proj.weight", "is an IP-Adapter"),
        ("control_model.task_embedding", "is a ControlNet-Union"),
        ("double_blocks.0.img_attn.qkv.weight", "of the Flux family"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "of the Stable Diffusion 3 family"),
    ],
)
def test_other_models_are_named(tmp_path, name, pattern):
    """What people take for a ControlNet or a Stable Diffusion checkpoint, alone or beside one's tensors."""
    for beside in ({}, original("control", folder=tmp_path)):
        refused(tmp_path, save({name: torch.ones(2)} | beside, tmp_path / "x.safetensors"), pattern)

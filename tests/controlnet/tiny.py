"""Random weights, and small first and condition stages saved in the files that users have."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

START, END = "<|startoftext|>", "<|endoftext|>"


def randomised(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def vae(levels: int = 2, blocks: int = 1) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=tuple(32 * (1 + level) for level in range(levels)),
        layers_per_block=blocks,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
    ).eval()


def original_vae_names(model: AutoencoderKL, blocks: int) -> dict[str, torch.Tensor]:
    """The model's tensors under latent-diffusion's names, written out from that code's module tree."""
    levels = len(model.config.block_out_channels)
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table |= {f"{half}.conv_norm_out": f"{half}.norm_out", f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1"}
        table |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in range(2)}
    for level in range(levels):
        up = levels - 1 - level
        table |= {f"encoder.down_blocks.{level}.resnets.{i}": f"encoder.down.{level}.block.{i}" for i in range(blocks)}
        table |= {f"decoder.up_blocks.{level}.resnets.{i}": f"decoder.up.{up}.block.{i}" for i in range(blocks + 1)}
        table[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        table[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{up}.upsample"
    inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    renamed = {}
    for name, tensor in model.state_dict().items():
        head = max((head for head in table if name.startswith(head + ".")), key=len)
        rest = name.removeprefix(head).replace("conv_shortcut", "nin_shortcut")
        if "attentions" in head:
            piece = max((piece for piece in inner if rest.startswith(f".{piece}.")), key=len)
            rest = rest.replace(f".{piece}.", f".{inner[piece]}.")
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        renamed[table[head] + rest] = tensor
    return renamed


def clip_folder(folder: Path, *, width: int = 16, layers: int = 3, length: int = 12) -> CLIPTextModel:
    """Saves a CLIP text model and a tokenizer of single letters and the word "cat"; returns the model."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(letter + "</w>" for letter in letters), "at</w>", "cat</w>", START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\nc at</w>\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": length,
                "bos_token": START,
                "eos_token": END,
                "unk_token": END,
                "pad_token": END,
            }
        )
    )
    torch.manual_seed(0)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(pieces),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=length,
            bos_token_id=pieces.index(START),
            eos_token_id=pieces.index(END),
            pad_token_id=pieces.index(END),
        )
    ).eval()
    model.save_pretrained(folder)
    return model

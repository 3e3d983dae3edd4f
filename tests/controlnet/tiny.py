"""Small first and condition stages with random weights, saved the way users have the real ones."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

START, END = "<|startoftext|>", "<|endoftext|>"


def vae(levels: int = 2, blocks: int = 1) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=tuple(32 * (1 + level) for level in range(levels)),
        layers_per_block=blocks,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
    ).eval()


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

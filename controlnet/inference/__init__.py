"""Inference: the denoising loop, requests and their images."""

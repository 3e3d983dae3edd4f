"""The denoising loop, and images to look at."""

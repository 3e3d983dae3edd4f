"""WebDataset shards in, batches out: `build_loader`.

`shards` finds the shards and the samples in them, `samples` decodes one sample, `loader` orders and batches them.
"""

from controlnet.data.loader import ImageShards, ShardLoader, build_loader
from controlnet.data.shards import DataError
from controlnet.data.synthetic import SyntheticLoader

__all__ = ["DataError", "ImageShards", "ShardLoader", "SyntheticLoader", "build_loader"]

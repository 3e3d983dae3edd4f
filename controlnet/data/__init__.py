"""WebDataset shards in, batches out: `build_loader`.

`shards` finds the shards and the samples in them, `samples` decodes one sample, `loader` orders and batches them.
"""

from controlnet.data.loader import ShardLoader, build_loader
from controlnet.data.shards import DataError

__all__ = ["DataError", "ShardLoader", "build_loader"]

"""Packs images, captions and hints into the shards that training reads, and checks existing shards.

python -m controlnet.shards IMAGES SHARDS [--hint canny]
python -m controlnet.shards --check SHARDS ...
"""

import sys

from controlnet.data.command import main

if __name__ == "__main__":
    sys.exit(main())

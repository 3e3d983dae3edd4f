"""Makes the shards that training reads, and checks shards that are there.

python -m controlnet.shards IMAGES SHARDS [--hint canny]
python -m controlnet.shards --check SHARDS ...
"""

import sys

from controlnet.data.command import main

if __name__ == "__main__":
    sys.exit(main())

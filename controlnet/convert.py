"""`python -m controlnet.convert SRC DST --format FORMAT`: one checkpoint format into another, bit for bit.

`controlnet.convert(src, dst, format)` is the same as a function, and stays so whoever imports this module: the import
system binds in the package what stands in `sys.modules`.
"""

import sys

from controlnet.checkpoints.command import main
from controlnet.checkpoints.convert import convert

if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__] = convert

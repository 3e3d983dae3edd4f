"""`python -m controlnet.convert SRC DST --format FORMAT`: one checkpoint format into another, bit for bit.

`controlnet.convert` is also the function that does this, so this file is a command alone: an imported module would take
the function's name in the package.
"""

import sys

from controlnet.checkpoints.command import main

if __name__ != "__main__":
    raise ImportError(
        "controlnet.convert is a function and a command, not a module to import: import controlnet and call"
        " controlnet.convert(src, dst, format), or run python -m controlnet.convert"
    )
sys.exit(main())

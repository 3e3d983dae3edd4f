"""Names that forward to rooms; `controlnet/__init__.py` finds them here.

They are the modules' names from before the package got folders, and the command `controlnet.convert`.
"""

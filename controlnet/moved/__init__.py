"""Modules under the names that they had before the package got folders; `controlnet/__init__.py` finds them here."""

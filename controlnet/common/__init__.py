"""Code that several packages share: command lines, checks for optional dependencies, and reading of tar headers."""

"""What several rooms share: the look of command lines, requests for optional packages, and the headers of tar files."""

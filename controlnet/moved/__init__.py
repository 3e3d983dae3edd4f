"""Names from before the package got folders: each module forwards to where its content is now."""

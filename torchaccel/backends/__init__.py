"""The backends, one file each; `base` has their contract."""

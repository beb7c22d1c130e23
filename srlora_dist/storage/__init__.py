"""The seam: how ranks hold tensors and talk to each other; one file per kind of storage."""

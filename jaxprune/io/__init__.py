"""Files: masked params and compacted networks in as few bytes as they need; safetensors in and out."""

from jaxprune.files.opened import FileError
from jaxprune.io.compacted import load_compacted, save_compacted
from jaxprune.io.layout import Layout
from jaxprune.io.read import Saved, load
from jaxprune.io.tensors import Checkpoint, load_safetensors, save_safetensors
from jaxprune.io.write import save

__all__ = [
    "Checkpoint",
    "FileError",
    "Layout",
    "Saved",
    "load",
    "load_compacted",
    "load_safetensors",
    "save",
    "save_compacted",
    "save_safetensors",
]

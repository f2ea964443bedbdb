"""Files: masked params in as few bytes as they need, compacted networks, and safetensors in and out."""

from jaxprune.files.opened import FileError
from jaxprune.io.compacted import load_compacted, save_compacted
from jaxprune.io.read import Saved, load
from jaxprune.io.tensors import load_safetensors, save_safetensors
from jaxprune.io.write import save

__all__ = [
    "FileError",
    "Saved",
    "load",
    "load_compacted",
    "load_safetensors",
    "save",
    "save_compacted",
    "save_safetensors",
]

"""Ways out: files for other runtimes, and repositories on the Hugging Face Hub."""

from fastprune.shipping.exporting import ExportedFile, export
from fastprune.shipping.hub import from_pretrained, push_to_hub, save_pretrained
from fastprune.shipping.subject import ExportError

__all__ = ["ExportError", "ExportedFile", "export", "from_pretrained", "push_to_hub", "save_pretrained"]

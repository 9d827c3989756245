"""Weights as safetensors, with what is known of the network in the header."""

from __future__ import annotations

from safetensors.torch import save

from fastprune.shipping.subject import Subject


def weights_bytes(subject: Subject) -> bytes:
    """Return the content of a safetensors file: parameters and buffers by name; network, plan and settings as metadata.

    The metadata are texts; ``network``, ``plan``, ``settings`` and ``results`` are JSON.
    """
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in subject.model.state_dict().items()}
    content: bytes = save(tensors, subject.metadata())
    return content

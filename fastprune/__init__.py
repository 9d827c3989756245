"""Channel pruning of convolutional networks for PyTorch: exact, fast, by any method.

>>> import torch, fastprune as fp
>>> model = fp.models.create("resnet20")
>>> result = fp.prune(model, torch.zeros(1, 3, 32, 32), method="l1", budget="flops=0.5")
>>> result.metrics["macs"]["planned"] <= 0.5 * result.metrics["macs"]["full"]
True

The names are listed in ``__init__.pyi``; each is imported when it is first used.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = version("fastprune")

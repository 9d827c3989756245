"""torchvision's detectors: R-CNNs, RetinaNet, FCOS, SSD; backbone, neck and heads are pruned, the class stays.

    result = torchvision.prune(retinanet_resnet50_fpn(weights="DEFAULT"), budget=0.5, method="taylor", data=loader)
    small = result.model.detector

A detector takes lists of images of any size, and chooses boxes by their scores, which no tracer follows. So what is
traced is its network alone: from a batch of images to the outputs of its heads, for proposals that are an input.
"""

try:
    import torchvision as _torchvision  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastprune.adapters.torchvision needs torchvision: pip install fastprune[vision] ({error})"
    ) from error

from fastprune.adapters.torchvision.boxes import make_boxes
from fastprune.adapters.torchvision.detectors import prune
from fastprune.adapters.torchvision.networks import DenseNetwork, RegionNetwork

__all__ = ["DenseNetwork", "RegionNetwork", "make_boxes", "prune"]

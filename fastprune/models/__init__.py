"""Networks: the papers' CIFAR architectures, those of other packages by name, and weights on disk."""

from fastprune.models.mobilenet import MobileNetV2, mobilenetv2
from fastprune.models.pretrained import names_weights
from fastprune.models.resnet import ResNet, resnet20, resnet32, resnet56, resnet110
from fastprune.models.resolve import available, create, takes
from fastprune.models.source import Source, source_of
from fastprune.models.weights import count_classes, load_weights, read_weights, save_weights

__all__ = [
    "MobileNetV2",
    "ResNet",
    "Source",
    "available",
    "count_classes",
    "create",
    "load_weights",
    "mobilenetv2",
    "names_weights",
    "read_weights",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
    "save_weights",
    "source_of",
    "takes",
]

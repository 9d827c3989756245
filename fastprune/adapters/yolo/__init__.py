"""Ultralytics networks: prune a ``YOLO``, and go on with it there: ``train``, ``val``, ``predict``, ``export``.

    small = yolo.prune(YOLO("yolo11n.pt"), budget=0.5, data="coco8.yaml")
    small.train(data="coco8.yaml", epochs=10)
    small.export(format="onnx")

Ultralytics comes with the extra ``yolo`` (``pip install fastprune[yolo]``), and is under the AGPL.
"""

try:
    import ultralytics as _ultralytics  # noqa: F401
except ImportError as error:
    raise ImportError(f"fastprune.adapters.yolo needs Ultralytics: pip install fastprune[yolo] ({error})") from error

from fastprune.adapters.yolo.data import DataSet
from fastprune.adapters.yolo.networks import load, prune

__all__ = ["DataSet", "load", "prune"]

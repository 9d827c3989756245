"""torchvision's detectors: pruned with their own loss, they stay detectors."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.models import detection
from torchvision.models.detection import anchor_utils

import fastprune as fp
from fastprune.adapters import torchvision as adapter
from fastprune.adapters.torchvision.batches import read_batches, run_batch
from fastprune.adapters.torchvision.boxes import inside
from fastprune.adapters.torchvision.criterion import Criterion
from fastprune.adapters.torchvision.networks import DenseNetwork, RegionNetwork, pool
from fastprune.data import UserData
from fastprune.host.distributed import Distributed

PAGE = Path(__file__).parents[2] / "docs/detectors.md"
SIDE, CLASSES, WIDTH = 64, 3, 8
Sample = dict[str, Tensor]


class Backbone(nn.Module):
    """A backbone of two levels."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 4, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, 48, 3, 2, 1) for _ in range(2))
        self.next = nn.ModuleList(nn.Conv2d(48, width, 1) for _ in range(2))
        self.out_channels: Any = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, features = torch.relu(self.first(images)), {}
        for place, (block, following) in enumerate(zip(self.blocks, self.next, strict=True)):
            x = torch.relu(following(torch.relu(block(x))))
            features[str(place)] = x
        return features


def make_detector(kind: str) -> Any:
    """Return a small detector for 3 classes, of which the first is the background for an R-CNN or an SSD."""
    torch.manual_seed(0)
    sizes, ratios = ((8,), (16,)), ((0.5, 1.0, 2.0),) * 2
    transform = {"min_size": SIDE, "max_size": SIDE}
    if kind == "SSD":
        boxes = anchor_utils.DefaultBoxGenerator([[2]] * 2, min_ratio=20, max_ratio=80)
        backbone = Backbone()
        backbone.out_channels = [WIDTH] * 2
        return detection.ssd.SSD(backbone, boxes, (SIDE, SIDE), CLASSES)
    if kind == "RetinaNet":
        return detection.RetinaNet(Backbone(), CLASSES, anchor_generator=anchors(sizes, ratios), **transform)
    if kind == "FCOS":
        return detection.FCOS(Backbone(32), CLASSES, anchor_generator=anchors(sizes, ((1.0,),) * 2), **transform)
    faster, mask, keypoint = detection.faster_rcnn, detection.mask_rcnn, detection.keypoint_rcnn
    parts = {
        "rpn_anchor_generator": anchors(sizes, ratios),
        "box_head": faster.TwoMLPHead(WIDTH * 49, 16),
        "box_predictor": faster.FastRCNNPredictor(16, CLASSES),
        **transform,
    }
    if kind == "MaskRCNN":
        parts |= {
            "mask_head": mask.MaskRCNNHeads(WIDTH, (12,), 1),
            "mask_predictor": mask.MaskRCNNPredictor(12, 12, CLASSES),
        }
    if kind == "KeypointRCNN":
        parts |= {
            "keypoint_head": keypoint.KeypointRCNNHeads(WIDTH, (12,)),
            "keypoint_predictor": keypoint.KeypointRCNNPredictor(12, 5),
        }
    return getattr(detection, kind)(Backbone(), **parts)


def anchors(sizes: Any, ratios: Any) -> Any:
    return anchor_utils.AnchorGenerator(sizes, ratios)


DENSE = ["RetinaNet", "FCOS", "SSD"]
REGIONS = ["FasterRCNN", "MaskRCNN", "KeypointRCNN"]


def make_samples(count: int = 2) -> tuple[list[Tensor], list[Sample]]:
    """Return images of several sizes with objects; the last image has none."""
    generator = torch.Generator().manual_seed(1)
    images, targets = [], []
    for place in range(count):
        height, width = 60 + 10 * place, 70
        boxes = torch.tensor([[8.0, 10.0, 40.0, 50.0], [30.0, 4.0, 60.0, 30.0]])[: 0 if place == count - 1 else 2]
        images.append(torch.rand(3, height, width, generator=generator))
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.tensor([1, 2])[: len(boxes)],
                "masks": (torch.rand(len(boxes), height, width, generator=generator) > 0.5).to(torch.uint8),
                "keypoints": torch.cat(
                    (50 * torch.rand(len(boxes), 5, 2, generator=generator), torch.ones(len(boxes), 5, 1)), 2
                ),
            }
        )
    return images, targets


def make_batch(detector: Any, proposals: int | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    return next(iter(read_batches([make_samples()], detector, (SIDE, SIDE), proposals)))


@pytest.mark.parametrize("kind", DENSE)
def test_the_loss_of_one_stage_is_the_detectors_own(kind: str) -> None:
    detector = make_detector(kind).train()
    batch = make_batch(detector)
    output, target = run_batch(DenseNetwork(detector), batch)
    ours = Criterion(detector, (SIDE, SIDE))(output, target)
    detector.transform = Given((SIDE, SIDE))
    targets = [{name: torch.tensor(value) for name, value in t.items()} for t in batch["targets"]]
    theirs = sum(detector(list(batch["images"]), targets).values())
    assert torch.allclose(ours, theirs)
    ours.backward()
    assert detector.backbone.first.weight.grad.abs().max() > 0


class Given(nn.Module):
    """A transform that changes nothing."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: list[Tensor], targets: Any) -> Any:
        return detection.image_list.ImageList(torch.stack(images), [self.size] * len(images)), targets

    def postprocess(self, found: Any, sizes: Any, originals: Any) -> Any:
        return found


@pytest.mark.parametrize("kind", REGIONS)
def test_the_loss_of_an_rcnn_is_its_own_where_all_boxes_count(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make_detector(kind).train()
    detector.rpn.fg_bg_sampler = All()
    batch = make_batch(detector, 8)
    output, target = run_batch(RegionNetwork(detector), batch)
    ours = Criterion(detector, (SIDE, SIDE))(output, target)

    detector.transform = Given((SIDE, SIDE))
    detector.roi_heads.fg_bg_sampler = All()
    boxes = list(inside(batch["boxes"], batch["images"]))
    monkeypatch.setattr(detector.rpn, "filter_proposals", lambda *arguments: (boxes, None))
    monkeypatch.setattr(detector.roi_heads, "add_gt_proposals", lambda proposals, objects: proposals)
    targets = [{name: torch.tensor(value) for name, value in t.items()} for t in batch["targets"]]
    losses = detector(list(batch["images"]), targets)
    assert len(losses) == (4 if kind == "FasterRCNN" else 5)
    assert all(float(loss.detach()) > 0 for loss in losses.values())
    assert torch.allclose(ours, sum(losses.values()), rtol=1e-4)


class All:
    """A sampler that takes all boxes that are an object or none of any."""

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [(x > 0).to(torch.uint8) for x in labels], [(x == 0).to(torch.uint8) for x in labels]


def test_boxes_are_pooled_as_by_torchvision() -> None:
    detector = make_detector("FasterRCNN")
    pooling, images = detector.roi_heads.box_roi_pool, torch.rand(2, 3, 256, 256)
    features = detector.backbone(images)
    boxes = inside(256 * torch.rand(2, 40, 4), images)
    boxes[0, 0] = torch.tensor([0.0, 0.0, 255.0, 255.0])
    expected = pooling(features, list(boxes), [(256, 256)] * 2)
    assert torch.allclose(pool(features, boxes, images, pooling), expected, atol=1e-6)
    assert pooling.map_levels is not None
    assert len(set(pooling.map_levels(list(boxes)).tolist())) == 2


def test_what_regions_are_pooled_from_is_pruned() -> None:
    network = RegionNetwork(make_detector("MaskRCNN"))
    graph = fp.trace(network, (torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, 8, 4)))
    assert {reason.partition(" in ")[0] for _, reason in graph.unprunable} == {"output of the network"}
    assert {group.name: group.size for group in graph.groups}["detector.backbone.next.0"] == WIDTH


def test_only_the_first_boxes_have_masks() -> None:
    detector = make_detector("MaskRCNN").train()
    batch = make_batch(detector, 300)
    output, target = run_batch(RegionNetwork(detector), batch)
    assert len(output["box"][0]) == 600
    assert len(output["mask"]) == 200
    assert Criterion(detector, (SIDE, SIDE))(output, target).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"), list(zip([*DENSE, *REGIONS], itertools.cycle(["taylor", "l1"]), strict=False))
)
def test_a_detector_is_pruned_and_stays_one(kind: str, method: str) -> None:
    detector = make_detector(kind)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    options = {"images": 4, "calibration": 4, "data": [make_samples(), make_samples()]} if method == "taylor" else {}
    result = adapter.prune(detector, method=method, budget=0.5, image_size=SIDE, proposals=8, **options)
    small = result.model.detector
    assert type(small) is type(detector)
    assert result.plan.code == "own"
    assert result.plan.macs[1] <= 0.5 * result.plan.macs[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    images, targets = make_samples()
    losses = small.train()(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)
    with torch.no_grad():
        found = small.eval()([torch.rand(3, 90, 50)])
    assert {"boxes", "labels", "scores"} <= set(found[0])


@pytest.mark.slow
def test_a_search_runs_on_a_detectors_loss() -> None:
    data = [make_samples() for _ in range(4)]
    result = adapter.prune(
        make_detector("RetinaNet"), method="dp", image_size=SIDE, data=data, epochs=1, compensate="none"
    )
    assert result.plan.macs[1] <= 0.5 * result.plan.macs[0]


def test_the_size_of_an_ssd_is_its_own() -> None:
    result = adapter.prune(make_detector("SSD"))
    assert result.plan.inputs[0].shape[1:] == (3, SIDE, SIDE)


@pytest.mark.slow
def test_the_guide_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text().split("## Detectors of torchvision")[1], re.M | re.S
    )
    assert "image_size=640" in code
    monkeypatch.setattr(detection, "retinanet_resnet50_fpn", lambda weights: make_detector("RetinaNet"))
    names: dict[str, Any] = {"loader": [make_samples()]}
    exec(compile(code.replace("640", str(SIDE)), PAGE.name, "exec"), names)
    assert type(names["small"]) is detection.RetinaNet


class Samples(Dataset[Any]):
    """Sixteen images, whose first pixel is their number."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, place: int) -> tuple[Tensor, Sample]:
        return torch.full((3, SIDE, SIDE), place / 16), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}


def test_a_data_loader_stays_one() -> None:
    sampler = DistributedSampler(Samples(), num_replicas=2, rank=0)
    loader = DataLoader(Samples(), 4, sampler=sampler, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    data = UserData(read_batches(loader, make_detector("RetinaNet"), (SIDE, SIDE), None))
    passes = [list(data.batches("train", 4, epoch=epoch, distributed=Distributed(0, 2))) for epoch in (0, 0, 1)]
    images = [torch.cat([inputs["images"] for inputs, _ in batches]) for batches in passes]
    assert data.size("train") == 16
    assert len(images[0]) == 8
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


class Shuffling(Backbone):
    """A backbone whose code splits channels."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        first, second = super().forward(images).values()
        return {"0": torch.cat(first.split(WIDTH // 2, 1)[::-1], 1), "1": second}


def test_a_detector_with_a_backbone_that_splits_channels_stays_one() -> None:
    detector = make_detector("RetinaNet")
    detector.backbone = Shuffling()
    small = adapter.prune(detector, image_size=SIDE).model.detector
    assert type(small) is detection.RetinaNet
    with torch.no_grad():
        assert set(small.eval()([torch.rand(3, 40, 50)])[0]) == {"boxes", "scores", "labels"}


def test_a_detector_of_one_level_is_pruned() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1), nn.ReLU())
    body.out_channels = 8  # type: ignore[assignment]
    detector = detection.RetinaNet(body, CLASSES, anchor_generator=anchors(((16,),), ((0.5, 1.0, 2.0),)))
    result = adapter.prune(detector, image_size=SIDE)
    assert result.plan.macs[1] <= 0.5 * result.plan.macs[0]


@pytest.mark.slow
def test_a_run_is_loaded(tmp_path: Path) -> None:
    detector = make_detector("FasterRCNN")
    result = adapter.prune(detector, image_size=SIDE, proposals=8, out=tmp_path / "run")
    small = fp.load(tmp_path / "run", model=RegionNetwork(detector)).detector.eval()
    image = torch.rand(3, 50, 60)
    with torch.no_grad():
        expected, got = result.model.detector.eval()([image])[0], small([image])[0]
    assert torch.equal(got["boxes"], expected["boxes"])


def test_what_is_no_detector_is_refused() -> None:
    with pytest.raises(TypeError, match="got ResNet; one of FasterRCNN, RetinaNet, FCOS, SSD is needed"):
        adapter.prune(fp.models.create("resnet20"))
    with pytest.raises(TypeError, match="loss: this function decides it"):
        adapter.prune(make_detector("SSD"), loss=nn.MSELoss())
    with pytest.raises(ValueError, match="proposals: got 1"):
        adapter.prune(make_detector("SSD"), proposals=1)
    with pytest.raises(ValueError, match="an iterator gives its batches once"):
        adapter.prune(make_detector("SSD"), method="taylor", data=iter([make_samples()]))

"""Networks as folders and repositories of the Hub."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_networks import Split
from torch import Tensor, nn

import fastprune as fp
from fastprune import models
from fastprune.cli.main import main
from fastprune.shipping.card import table
from fastprune.shipping.subject import ExportError, read_subject

hub = pytest.importorskip("huggingface_hub")

DATA = "synthetic:3x8x8:4:128"


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of the command line, fine-tuned."""
    out = tmp_path_factory.mktemp("hub") / "run"
    options = "--method soft --budget flops=0.6 --round_to 4 --soft.epochs 1 --ignore conv1 --seed 3"
    assert main(shlex.split(f"prune --model resnet20 --data {DATA} {options} --out {out}")) == 0
    assert main(shlex.split(f"finetune --run {out} --epochs 1 --batch_size 32")) == 0
    return out


def equal(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one.eval()(images), other.eval()(images))


def test_a_run_and_back(run: Path, images: Tensor, tmp_path: Path) -> None:
    folder = fp.save_pretrained(run, tmp_path / "net")
    assert {path.name for path in folder.iterdir()} == {"config.json", "plan.json", "model.safetensors", "README.md"}
    assert equal(fp.from_pretrained(folder), fp.load(run), images)
    assert not fp.from_pretrained(folder).training
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["method"] == "soft"
    assert config["network"]["source"]["model"] == "resnet20"


def test_the_card(run: Path, tmp_path: Path) -> None:
    folder = fp.save_pretrained(run, tmp_path / "net", repo_id="me/net")
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "fastprune"
    assert card.data.tags == ["pytorch", "channel-pruning", "soft"]
    text = card.content
    assert 'model = fp.from_pretrained("me/net")' in text
    plan = fp.PruningPlan.load(run / "plan.json")
    results = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"result"' in line]
    before, cut = (100 * results[0][name]["accuracy"] for name in ("baseline", "compact"))
    tuned = 100 * results[1]["compact"]["accuracy"]
    part = f"{plan.macs[1] / 1e6:,.2f} M ({100 * plan.macs[1] / plan.macs[0]:.1f} %)"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [(row[0], row[1], row[3]) for row in rows[1:]] == [
        ("| before", f"{plan.macs[0] / 1e6:,.2f} M", f"{before:.2f} % |"),
        ("| pruned", part, f"{cut:.2f} % |"),
        ("| pruned and fine-tuned", part, f"{tuned:.2f} % |"),
    ]


def test_top5_on_the_card(run: Path) -> None:
    found = {"baseline": {"accuracy": 0.9, "top5": 0.995}, "compact": {"accuracy": 0.5}}
    lines = table(replace(read_subject(run), results=found)).splitlines()
    assert lines[0].endswith("| top-1 accuracy | top-5 accuracy |")
    assert [line.split(" | ")[3:] for line in lines[2:]] == [["90.00 %", "99.50 % |"], ["50.00 %", "not measured |"]]


def test_the_command_of_the_card_makes_the_network_again(run: Path, images: Tensor, tmp_path: Path) -> None:
    folder = fp.save_pretrained(run, tmp_path / "net")
    commands = (folder / "README.md").read_text().split("```sh\n")[1].split("```")[0].replace("\\\n", "").splitlines()
    assert [line.split()[1] for line in commands] == ["prune", "finetune"]
    for line in commands:
        assert main(shlex.split(line.replace("RUN", str(tmp_path / "again")))[1:]) == 0
    assert equal(fp.load(tmp_path / "again"), fp.load(run), images)


def test_a_network_of_ones_own(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = fp.prune(Split(), images, method="l1", limits=fp.Limits(min_keep=2))
    assert isinstance(result.model, fp.RewrittenNetwork)
    nn.init.normal_(result.model.get_parameter("last.weight"))  # weights are those of now
    folder = fp.save_pretrained(result, tmp_path / "net")
    with pytest.raises(ExportError, match=r"a Split, is made by its author's own code.*model=net"):
        fp.from_pretrained(folder)
    assert equal(fp.from_pretrained(folder, model=Split()), result.model, images)
    card = (folder / "README.md").read_text()
    assert ", model=net)" in card
    options = ("net, example", "method='l1'", "budget='flops=0.5'", "seed=0", "limits=fp.Limits.parse([], min_keep=2)")
    assert "fp.prune(\n" + "".join(f"    {option},\n" for option in options) + ")\n" in card


def test_a_result_of_a_network_by_name(images: Tensor, tmp_path: Path) -> None:
    result = fp.prune(models.create("resnet20", num_classes=4), images, method="l1")
    assert equal(fp.from_pretrained(fp.save_pretrained(result, tmp_path / "net")), result.model, images)
    result.model.relu = nn.SiLU()  # no longer what the name builds
    folder = fp.save_pretrained(result, tmp_path / "other")
    with pytest.raises(ExportError, match="model=net"):
        fp.from_pretrained(folder)


def test_code_that_a_file_names_is_never_called(run: Path, tmp_path: Path) -> None:
    folder = fp.save_pretrained(run, tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    config["network"]["source"]["model"] = "os:abort"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="its author's own code"):
        fp.from_pretrained(folder)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"network": 3}', '{"network": {"format": "x"}}'])
def test_folders_of_something_else(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ExportError, match="save_pretrained"):
        fp.from_pretrained(tmp_path)


def test_a_card_that_somebody_wrote_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    fp.save_pretrained(run, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_upload_and_download(run: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Api:
        """Stands for the Hub: its repository is a folder."""

        def __init__(self, token: str | None) -> None:
            calls.append({"token": token})

        def create_repo(self, **given: Any) -> SimpleNamespace:
            calls.append(given)
            return SimpleNamespace(repo_id="user/net")

        def upload_folder(self, *, repo_id: str, folder_path: Path, **given: Any) -> str:
            calls.append({"repo_id": repo_id, **given})
            shutil.copytree(folder_path, tmp_path / "repository")
            return "https://hub/commit"

    def download(repo_id: str, **given: Any) -> str:
        calls.append({"repo_id": repo_id, **given})
        return str(tmp_path / "repository")

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert fp.push_to_hub(run, "net", private=True, token="secret", revision="dev") == "https://hub/commit"
    assert calls[0] == {"token": "secret"}
    assert calls[1] == {"repo_id": "net", "private": True, "exist_ok": True}
    assert (calls[2]["repo_id"], calls[2]["revision"]) == ("user/net", "dev")
    assert 'from_pretrained("net")' in (tmp_path / "repository" / "README.md").read_text()
    assert equal(fp.from_pretrained("user/net", revision="dev"), fp.load(run), images)
    assert (calls[3]["repo_id"], calls[3]["revision"]) == ("user/net", "dev")
    assert set(calls[3]["allow_patterns"]) == {"config.json", "plan.json", "model.safetensors", "README.md"}


def test_without_huggingface_hub(run: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fp.save_pretrained(run, tmp_path / "net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (fp.save_pretrained, fp.push_to_hub):
        with pytest.raises(ExportError, match=r"pip install 'fastprune\[hub\]'"):
            call(run, str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    assert equal(fp.from_pretrained(folder), fp.load(run), images)  # a folder needs no Hub
    monkeypatch.undo()
    with pytest.raises(TypeError, match="got a Split; give a result of prune"):
        fp.save_pretrained(Split(), tmp_path / "other")  # type: ignore[arg-type]

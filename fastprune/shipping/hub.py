"""Networks as folders and repositories of the Hugging Face Hub."""

from __future__ import annotations

import importlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.engine import choose_device
from fastprune.graph.plan import PruningPlan
from fastprune.host import atomic
from fastprune.models import load_weights, save_weights
from fastprune.pruning import PruningResult
from fastprune.runs import NetworkRecord
from fastprune.runs.loading import match_precision
from fastprune.shipping.card import card_text
from fastprune.shipping.subject import ExportError, Subject, read_subject
from fastprune.surgery import apply
from fastprune.surgery.slicing import copy_model

CONFIG, PLAN, WEIGHTS, CARD = "config.json", "plan.json", "model.safetensors", "README.md"

What = PruningResult | str | Path


def save_pretrained(
    what: What, folder: str | Path, *, model: nn.Module | None = None, repo_id: str | None = None
) -> Path:
    """Write a pruned network as a folder that ``from_pretrained`` reads.

    The folder holds ``config.json`` (what builds the full network, and the settings), ``plan.json``,
    ``model.safetensors`` and ``README.md``, a model card. A card that is there already is kept.

    Args:
        what: a result of ``prune``, or the directory of a run.
        folder: the folder; it is made if it does not exist.
        model: the full network of a run that cannot be built by a name; see ``fastprune.load``.
        repo_id: the repository that the card names; None = the folder.

    Returns:
        The folder.

    Raises:
        ExportError: without huggingface_hub; says how to get it.
    """
    hub = import_hub()
    if not isinstance(what, (PruningResult, str, Path)):
        raise TypeError(f"got a {type(what).__name__}; give a result of prune, or a run's directory")
    subject, folder = read_subject(what, model=model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "library_name": "fastprune",
        "fastprune": version("fastprune"),
        "network": subject.record().to_json(),
        "settings": dict(subject.settings),
        "finetuning": dict(subject.finetuning),
        "results": dict(subject.results),
    }
    if subject.plan is not None:
        subject.plan.save(folder / PLAN)
    save_weights(subject.model, folder / WEIGHTS)
    atomic.write_text(folder / CONFIG, json.dumps(config, indent=2, default=str) + "\n")
    if not (folder / CARD).exists():
        make_card(hub, subject, repo_id or str(folder)).save(folder / CARD)
    return folder


def make_card(hub: Any, subject: Subject, repository: str) -> Any:
    """Return the model card."""
    method = subject.settings.get("method")
    data = hub.ModelCardData(
        library_name="fastprune",
        tags=["pytorch", "channel-pruning", *([str(method)] if method else [])],
        base_model=None,
        model_name=subject.name,
    )
    return hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(subject, repository)}")


def from_pretrained(
    place: str | Path,
    *,
    model: nn.Module | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Return the network that ``save_pretrained`` or ``push_to_hub`` wrote.

    Args:
        place: a folder, or the name of a repository on the Hub, which is downloaded.
        model: the full network, with any weights; needed unless fastprune, torchvision or timm build it by name.
        device: "cpu", "cuda", "cuda:N" or "auto"; None = where ``model`` is, or the CPU.
        revision: branch, tag or commit of the repository.
        token: token for a private repository; None = that of ``hf auth login``.

    Returns:
        The compact network in eval mode.

    Raises:
        ExportError: if the folder is none of fastprune's, or its network needs ``model``. The name of a function in a
            file that others wrote is never called.
    """
    folder = Path(place)
    if not folder.is_dir():
        names = [CONFIG, PLAN, WEIGHTS, CARD]
        folder = Path(import_hub().snapshot_download(str(place), revision=revision, token=token, allow_patterns=names))
    record = read_config(folder)
    if model is not None:
        network = copy_model(model)
    elif record.source is None or not record.source.is_known:
        raise ExportError(
            f"{str(place)!r}: its network, a {record.name}, is made by its author's own code; give the full network, "
            "with any weights: fp.from_pretrained(…, model=net)"
        )
    else:
        network = record.source.build(record.classes)
    match_precision(network, folder / WEIGHTS)
    if (folder / PLAN).is_file():
        network = apply(PruningPlan.load(folder / PLAN), network, check=False)
    load_weights(network, folder / WEIGHTS)
    return network.eval() if device is None else network.eval().to(choose_device(device))


def read_config(folder: Path) -> NetworkRecord:
    """Return what ``config.json`` says of the full network."""
    file = folder / CONFIG
    if not file.is_file():
        raise ExportError(f"{str(folder)!r} holds no {CONFIG}; a folder of save_pretrained is needed")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return NetworkRecord.from_json(values["network"] if isinstance(values, dict) else None)
    except (ValueError, KeyError, RecursionError) as error:
        raise ExportError(f"{str(file)!r}: not written by save_pretrained ({error})") from error


def push_to_hub(
    what: What,
    repo_id: str,
    *,
    model: nn.Module | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a network pruned with fastprune",
    create_pr: bool = False,
) -> str:
    """Upload a pruned network to the Hugging Face Hub.

    Args:
        what: a result of ``prune``, or the directory of a run.
        repo_id: the repository, "user/name"; it is made if it does not exist.
        model: the full network of a run that cannot be built by a name; see ``fastprune.load``.
        private: whether a new repository is private; None = as the organisation has it.
        token: a token with the right to write; None = that of ``hf auth login``.
        revision: the branch; None = the main one.
        commit_message: the message of the commit.
        create_pr: whether to open a pull request in place of a commit.

    Returns:
        The address of the commit.

    Raises:
        ExportError: without huggingface_hub; says how to get it.
    """
    hub = import_hub()
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(what, Path(temporary) / "network", model=model, repo_id=repo_id)
        api = hub.HfApi(token=token)
        name = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
            )
        )


def import_hub() -> Any:
    """Import huggingface_hub."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ExportError(f"the Hub needs one more package: pip install 'fastprune[hub]' ({error})") from error

"""The model card of a compact network, and the command that makes it again."""

from __future__ import annotations

from fastprune.report.command import commands
from fastprune.shipping.subject import Subject

ROWS = {"baseline": "before", "compact": "pruned", "fine-tuned": "pruned and fine-tuned"}


def card_text(subject: Subject, repository: str) -> str:
    """Return the text of a model card, without its header.

    Args:
        subject: the network.
        repository: the name under which the card shows how to load it.
    """
    settings = subject.settings
    name = subject.name
    given = "" if subject.source is not None and subject.source.is_known else ", model=net"
    parts = [
        f"# {name}, pruned" if subject.plan is not None else f"# {name}",
        f"A `{name}` whose channels were pruned with [fastprune](https://pypi.org/project/fastprune)."
        if subject.plan is not None else f"A `{name}`, trained with fastprune.",
    ]  # fmt: skip
    if settings.get("method"):
        parts.append(f"* method: `{settings['method']}`\n* budget: `{settings.get('budget')}`")
    if subject.plan is not None:
        parts += ["## Before and after", table(subject)]
    parts += ["## How to load it", loading_text(repository, given, subject)]
    command = reproduce(subject)
    if command:
        parts += ["## How to make it again", command]
    return "\n\n".join(parts) + "\n"


def loading_text(repository: str, given: str, subject: Subject) -> str:
    """Return code that loads the network."""
    sizes = ", ".join("×".join(map(str, spec.shape[1:])) for spec in subject.inputs)
    code = f'import fastprune as fp\n\nmodel = fp.from_pretrained("{repository}"{given})'
    note = f"\n\n`net` is the full network, a `{subject.class_name}`, with any weights." if given else ""
    return f"```python\n{code}\n```{note}\n\nIt was pruned with inputs of {sizes}."


def table(subject: Subject) -> str:
    """Return MACs, parameters and, where they were measured, top-1 and top-5 accuracies before and after."""
    plan = subject.plan
    assert plan is not None
    columns = {"top-1 accuracy": accuracies(subject, "accuracy"), "top-5 accuracy": accuracies(subject, "top5")}
    columns = {head: column for head, column in columns.items() if column}
    heads = ["network", "MACs", "parameters", *columns]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for title in ROWS.values():
        if title == ROWS["fine-tuned"] and not any(title in column for column in columns.values()):
            continue
        nth = 0 if title == ROWS["baseline"] else 1
        cells = [change(plan.macs, nth), change(plan.params, nth)]
        for column in columns.values():
            cells.append(f"{column[title]:.2f} %" if title in column else "not measured")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracies(subject: Subject, measure: str) -> dict[str, float]:
    """Return the networks' accuracies in per cent, by the titles of their rows, as far as they were measured."""
    return {
        title: 100 * subject.results[name][measure]
        for name, title in ROWS.items()
        if isinstance(subject.results.get(name, {}).get(measure), (int, float))
    }


def change(sizes: tuple[int, int], nth: int) -> str:
    """Return a size in millions, the second one also as a percentage of the first."""
    part = f" ({100 * sizes[1] / sizes[0]:.1f} %)" if nth else ""
    return f"{sizes[nth] / 1e6:,.2f} M{part}"


def reproduce(subject: Subject) -> str:
    """Return the commands, or the call, that make the network again; "" if its settings are not known."""
    settings = subject.settings
    if settings.get("command") not in ("demo", "prune", "train"):
        return ""
    lines = commands(settings, subject.finetuning, "RUN")
    earlier = settings.get("from_run")
    before = f"It prunes the network of the run `{earlier}` further.\n\n" if earlier else ""
    language = "sh" if lines[0].startswith("fastprune") else "python"
    return before + f"```{language}\n" + "\n".join(lines) + "\n```"

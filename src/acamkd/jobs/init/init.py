"""Look at a folder of images, and write a recipe for it that runs as it is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from acamkd import config, data
from acamkd.data.statistics import Statistics, count
from acamkd.distillation.pairs import propose
from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.files import check_writable_file, write_text
from acamkd.jobs.estimate import Estimate, estimate
from acamkd.jobs.init.choices import (
    DENSE,
    Machine,
    choose_batch,
    choose_epochs,
    choose_frame,
    inherited,
    this_machine,
)
from acamkd.jobs.init.layout import Layout, find_layouts
from acamkd.jobs.init.names import Ask, name_classes
from acamkd.jobs.init.recipe_text import Reasons, file_name, quoted, recipe_text
from acamkd.jobs.init.splits import check_apart, find_unlabeled
from acamkd.jobs.init.teacher import Teacher, identify
from acamkd.jobs.inspect_layers import as_losses, of_recipe
from acamkd.models.base import Task
from acamkd.progress import muted

log = logging.getLogger(__name__)

SHARE = 0.2
"""Of the training images, for validation, where a folder has no images for it."""


@dataclass(frozen=True)
class Proposal(Printable):
    """A recipe that was written.

    Attributes:
        file: The recipe.
        found: What lies in the folder, in words.
        warnings: What is worth a thought before the training.
        estimate: What a step of the distillation takes here; None where the system does not say, or where
            the images have problems.
    """

    file: Path
    found: str
    warnings: tuple[str, ...]
    estimate: Estimate | None

    @property
    def commands(self) -> tuple[str, str, str]:
        """The three trainings, in their order."""
        file = quoted(self.file)
        return (f"acamkd train {file} --role teacher", f"acamkd train {file}", f"acamkd distill {file}")

    def __rich__(self) -> Text:
        text = Text(f"{self.found}\n")
        for warning in self.warnings:
            text.append("warn", "yellow").append(f"  {warning}\n")
        text.append(f"{self.file} is written; every choice has its reason there. Next, all in one:\n")
        text.append(f"  acamkd run {quoted(self.file)}", "bold").append(
            "   # checks before, and compares after\nor one by one:"
        )
        for command, why in zip(self.commands, ("the teacher", "the baseline", "the distilled student"), strict=True):
            text.append(f"\n  {command}", "bold").append(f"   # {why}")
        return text


def init(
    folder: Path | str,
    *,
    task: Task | None = None,
    classes: Sequence[str] | None = None,
    teacher: Path | str | None = None,
    teacher_network: str | None = None,
    unlabeled: Path | str | None = None,
    out: Path | str | None = None,
    overwrite: bool = False,
    ask: Ask | None = None,
) -> Proposal:
    """Look at a folder of images, and write a commented recipe of at most forty lines that runs as it is.

    Nothing in the folder is changed. Where there are no images for validation, some of the training images serve.

    Args:
        folder: Images and annotations, in a layout that is known.
        task: Needed where the folder has boxes and masks.
        classes: Names, needed where masks or text files come without.
        teacher: A checkpoint of the teacher; where not given, the recipe trains one.
        teacher_network: What it is, ARCH/BACKBONE, where its tensors do not tell.
        unlabeled: Folder of further images, relative to the folder or to the current one, or absolute; found by its
            name where not given.
        out: The recipe; NAME.yaml in the current folder where not given, with the folder's name.
        overwrite: Replace it.
        ask: Puts a question where something is missing; without it that is an error.

    Returns:
        The recipe's file, and what was found.

    Raises:
        AcamkdError: The folder is not known, something is missing, or the recipe is there or cannot be written.
    """
    root = Path(folder).expanduser().resolve()
    file = Path(out).expanduser() if out else Path(f"{file_name(root.name)}.yaml")
    check_writable_file(file)
    if file.exists() and not overwrite:
        raise AcamkdError(f"{file} is there already: --overwrite replaces it, --out FILE writes elsewhere")
    layout = _chosen(find_layouts(root), task, ask)
    task, machine = layout.task, this_machine()
    named = name_classes(layout, classes, ask)
    labeled = [folder for folders in layout.folders.values() for folder in folders]
    found = find_unlabeled(root, labeled)
    more = _unlabeled(root, Path(unlabeled).expanduser()) if unlabeled else next(iter(found), None)
    without = [] if layout.leaves_out else [root / each for each in dict.fromkeys([*found, *([more] if more else [])])]
    check_apart({**layout.folders, "unlabeled": without})
    source: dict[str, Any] = {"format": layout.format, "root": str(root), **layout.splits}
    if "val" not in source:
        source["val"] = {"share": SHARE}
    source |= named.keys
    source |= {"unlabeled": more} if more else {}
    counted, own_classes = _count(source, task)
    frame = choose_frame(counted["train"], task, machine)
    source |= {"resize": frame.resize, "augment": frame.augment}
    known = identify(Path(teacher).expanduser(), task, teacher_network) if teacher else None
    networks = _networks(task, machine, known, len(own_classes))
    images = counted["train"].images
    blank = _parsed(file, task, source, networks, [], choose_batch(images, machine, None), 16)
    unfilled = {
        role: {**section.model_dump(), "weights": None, "backbone_weights": None, "inherit": ()}
        for role, section in (("teacher", blank.teacher), ("student", blank.student))
        if section is not None
    }
    built = of_recipe(blank.model_copy(update={"data": blank.data.model_copy(update={"classes": own_classes})}))
    losses = as_losses(propose(*built), built[1], all_labeled=not more)
    problems = [problem for each in counted.values() for problem in each.problems]
    # A step would stop at the first of them, and no recipe would be there to mend it in.
    measured = (
        None if problems else _measured(_parsed(file, task, source, unfilled, losses, blank.train.batch_size, 16))
    )
    batch = choose_batch(images, machine, measured.largest_batch if measured else None)
    epochs, every = choose_epochs(images, batch, machine)
    train = {"epochs": epochs, "eval_every": every, "batch_size": batch}
    reasons = Reasons(
        layout, named, counted, frame.reason, frame.augment_reason, machine, known, measured, len(own_classes)
    )
    text = recipe_text(file, task, source, networks, losses, train, reasons)
    _check(text, file)
    write_text(file, text)
    warnings = [*named.warnings, *(warning for each in counted.values() for warning in each.warnings)]
    if problems:
        warnings.append(
            f"{len(problems)} problems to be mended first, such as {problems[0]}: acamkd doctor {quoted(file)} --data"
        )
    if not more:
        warnings.append(NOTHING_UNLABELED)
    plural = "es" if len(own_classes) != 1 else ""
    said = (
        f"{root}: {layout.format}, since {layout.reason}; {task}; {len(own_classes)} class{plural}; "
        f"{', '.join(f'{each.images} {name}' for name, each in counted.items())} images"
    )
    return Proposal(file, said, tuple(warnings), measured)


NOTHING_UNLABELED = (
    "no unlabeled images: our clearest gains had them, with few labels; with all labels such networks gained nothing "
    "(docs/research/results.md). A folder of them goes into data.unlabeled, or --unlabeled FOLDER"
)


def _chosen(layouts: Sequence[Layout], task: Task | None, ask: Ask | None) -> Layout:
    """The layout of the task that is meant; several formats of one task are told in the order of `find_layouts`."""
    offered = [layout for layout in layouts if not layout.on_request] if task is None else layouts
    tasks = list(dict.fromkeys(layout.task for layout in offered))
    if task is None and len(tasks) > 1 and ask is not None:
        answer = ask(f"The folder is good for {' and '.join(tasks)}. Which one?").strip().lower()
        task = next((each for each in tasks if answer and each.startswith(answer)), None)
    if task is None and len(tasks) > 1:
        raise AcamkdError(f"the folder is good for {' and '.join(tasks)}: say which with --task")
    fitting = [layout for layout in offered if task in (None, layout.task)]
    for layout in layouts:
        if layout not in offered:
            log.info("it is good for %s, too, since %s: --task %s", layout.task, layout.reason, layout.task)
    if not fitting:
        raise AcamkdError(f"the folder has nothing for {task}, only for {' and '.join(tasks)} ({layouts[0].reason})")
    if len(fitting) > 1:
        log.info("%s, since %s; it could be read as %s, too", fitting[0].format, fitting[0].reason, fitting[1].format)
    return fitting[0]


def _unlabeled(root: Path, given: Path) -> str:
    """A folder as the recipe writes it: relative to the root, or absolute; raises AcamkdError if it is not there."""
    if (root / given).is_dir():
        return str(given)
    if given.is_dir():
        return str(given.resolve())
    raise AcamkdError(f"--unlabeled {given}: there is no such folder, neither in {root} nor in the current folder")


def _count(source: dict[str, Any], task: Task) -> tuple[dict[str, Statistics], tuple[str, ...]]:
    """What the splits hold, and the classes."""
    parsed = config.Data.model_validate({**source, "test": None})
    if parsed.unlabeled is not None:
        data.refuse(data.build_unlabeled(parsed, task, seed=0).problems)
    datasets = {split: data.build(parsed, task, split, seed=0, augment=False) for split in ("train", "val")}
    counted = {split: count(dataset, decode=False) for split, dataset in datasets.items()}
    return counted, datasets["train"].classes


def _networks(task: Task, machine: Machine, known: Teacher | None, classes: int) -> dict[str, dict[str, Any]]:
    """Sections of teacher and student."""
    teacher, student = (dict(section) for section in machine.networks[task])
    if known is not None:
        if known.num_classes != classes and task == "segmentation":
            raise AcamkdError(f"the teacher, {known.text}, has other classes than the data, {classes}: its logits are "
                              "compared, so that it must have the same")  # fmt: skip
        teacher = known.section.model_dump(mode="json", exclude_defaults=True)
        if teacher.get("backbone_weights", "") is None:
            del teacher["backbone_weights"]  # the file has them
        if task == "detection":
            student["fpn_channels"] = known.section.fpn_channels
            student["arch"] = known.section.arch if known.section.arch in DENSE else student["arch"]
        if known.num_classes != classes:
            teacher["num_classes"] = known.num_classes
    same = known is None or known.num_classes == classes
    if parts := inherited(config.Model.model_validate(teacher), config.Model.model_validate(student), same):
        student["inherit"] = parts
    return {"teacher": teacher, "student": student}


def _parsed(
    file: Path, task: Task, source: dict[str, Any], networks: dict[str, dict[str, Any]], losses: list[dict[str, Any]],
    batch: int, epochs: int,
) -> config.Recipe:  # fmt: skip
    raw = {"name": file_name(file.stem), "task": task, "data": source, **networks, "losses": losses}
    return config.parse({**raw, "train": {"epochs": epochs, "batch_size": batch}}, source=str(file))


def _measured(recipe: config.Recipe) -> Estimate | None:
    """What a step takes; None where the system does not say how much memory is free."""
    if not (torch.cuda.is_available() or Path("/proc/meminfo").is_file()):
        return None
    with muted("acamkd.models"):  # which would miss the teacher's weights
        return estimate(recipe)


def _check(text: str, file: Path) -> None:
    """Raise AcamkdError if the text is no recipe."""
    config.parse({"name": file.stem, **config.read_yaml(text, str(file))}, source=str(file))  # as it is loaded

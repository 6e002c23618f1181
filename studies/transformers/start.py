"""Write the weights with which every student of a task starts: the teacher's, and a backbone from ImageNet.

    python studies/transformers/start.py studies/transformers/voc07mini.yaml weights/lite0.safetensors OUTPUT

The teacher must have been trained. `student.inherit` would do the same, but only where the methods share a teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acamkd import config, models
from acamkd.engine.runs import default_folder, open_run
from acamkd.models.weights import save_weights


def main() -> None:
    """Take every tensor outside the backbone that has the teacher's name and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("backbone", help="a .safetensors file")
    parser.add_argument("output", type=Path, help="a .safetensors file")
    arguments = parser.parse_args()
    recipe = config.load(arguments.recipe)
    teacher = open_run(default_folder(recipe, "teacher")).load()
    blank = recipe.student.model_copy(update={"weights": None, "backbone_weights": arguments.backbone})
    student = models.build(blank, recipe.task, teacher.num_classes)
    backbone = {id(tensor) for tensor in student.backbone.state_dict(keep_vars=True).values()}
    own, theirs = student.net.state_dict(keep_vars=True), teacher.net.state_dict()
    taken = {
        name: theirs[name] for name, tensor in own.items()
        if name in theirs and theirs[name].shape == tensor.shape and id(tensor) not in backbone
    }  # fmt: skip
    student.net.load_state_dict(taken, strict=False)
    save_weights(student.net, arguments.output)
    print(f"{len(taken)} of {len(own) - len(backbone)} tensors outside the backbone are the teacher's")


if __name__ == "__main__":
    main()

"""Recipes. Imports no torch, so that the command line answers at once."""

from acamkd.config.loading import dump, imported, load, override, parse, read_text
from acamkd.config.schema import (
    FORMATS,
    Augmentation,
    Comparison,
    Data,
    Loss,
    Model,
    Optimizer,
    Recipe,
    Schedule,
    Search,
    ShortLong,
    Size,
    Split,
    Train,
    check_data,
)

__all__ = [
    "FORMATS",
    "Augmentation",
    "Comparison",
    "Data",
    "Loss",
    "Model",
    "Optimizer",
    "Recipe",
    "Schedule",
    "Search",
    "ShortLong",
    "Size",
    "Split",
    "Train",
    "check_data",
    "dump",
    "imported",
    "load",
    "override",
    "parse",
    "read_text",
]

"""Recipes. Imports no torch, so that the command line answers at once."""

from acamkd.config.data import Augmentation, Data, ShortLong, Size, Split, parse_mask_value
from acamkd.config.loading import as_recipe, dump, imported, load, override, parse, read_text, respelled
from acamkd.config.schema import Comparison, Loss, Model, Recipe, Search
from acamkd.config.train import Logger, Optimizer, Schedule, Train
from acamkd.config.yaml_text import read_yaml, write_yaml

__all__ = [
    "Augmentation",
    "Comparison",
    "Data",
    "Logger",
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
    "as_recipe",
    "dump",
    "imported",
    "load",
    "override",
    "parse",
    "parse_mask_value",
    "read_text",
    "read_yaml",
    "respelled",
    "write_yaml",
]

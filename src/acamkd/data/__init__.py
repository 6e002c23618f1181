"""Images and targets: one data set class per format, and the loader that both networks are fed from."""

from acamkd.data.build import build, build_unlabelled, loader, resolve
from acamkd.data.checks import check, check_same_classes, compare_splits, refuse
from acamkd.data.dataset import PictureDataset
from acamkd.data.formats.cityscapes import Cityscapes
from acamkd.data.formats.coco import CocoDetection
from acamkd.data.formats.masks import MaskFolder
from acamkd.data.formats.voc import VocDetection, VocSegmentation
from acamkd.data.formats.yolo import YoloDetection
from acamkd.data.loading import PictureLoader, naming_pictures
from acamkd.data.samplers import SeededSampler, ShareSampler
from acamkd.data.transforms import augmentation
from acamkd.data.unlabeled import WithUnlabelled

__all__ = [
    "Cityscapes",
    "CocoDetection",
    "MaskFolder",
    "PictureDataset",
    "PictureLoader",
    "SeededSampler",
    "ShareSampler",
    "VocDetection",
    "VocSegmentation",
    "WithUnlabelled",
    "YoloDetection",
    "augmentation",
    "build",
    "build_unlabelled",
    "check",
    "check_same_classes",
    "compare_splits",
    "loader",
    "naming_pictures",
    "refuse",
    "resolve",
]

"""Images and targets: one data set class per format, and the loader that both networks are fed from."""

from acamkd.data.build import build, build_unlabeled, loader, resolve
from acamkd.data.checks import check, check_same_classes, compare_splits, refuse
from acamkd.data.dataset import ImageDataset
from acamkd.data.formats import FORMATS
from acamkd.data.formats.cityscapes import Cityscapes
from acamkd.data.formats.coco import CocoDetection
from acamkd.data.formats.masks import MaskFolder
from acamkd.data.formats.voc import VocDetection, VocSegmentation
from acamkd.data.formats.yolo import YoloDetection
from acamkd.data.loading import ImageLoader, reading
from acamkd.data.samplers import DistributedSequentialSampler, SeededSampler
from acamkd.data.transforms import augmentation
from acamkd.data.unlabeled import WithUnlabeled

__all__ = [
    "FORMATS",
    "Cityscapes",
    "CocoDetection",
    "DistributedSequentialSampler",
    "ImageDataset",
    "ImageLoader",
    "MaskFolder",
    "SeededSampler",
    "VocDetection",
    "VocSegmentation",
    "WithUnlabeled",
    "YoloDetection",
    "augmentation",
    "build",
    "build_unlabeled",
    "check",
    "check_same_classes",
    "compare_splits",
    "loader",
    "reading",
    "refuse",
    "resolve",
]

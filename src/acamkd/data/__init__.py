"""Images and targets: one data set class per format, and the loader of both networks' batches."""

from acamkd.data.boxes import Box, BoxDataset
from acamkd.data.build import build, build_unlabeled, loader, resolve
from acamkd.data.checks import check, check_same_classes, compare_splits, compare_test, refuse
from acamkd.data.dataset import ImageDataset
from acamkd.data.formats import FORMATS
from acamkd.data.formats.cityscapes import Cityscapes
from acamkd.data.formats.coco import CocoDetection, CocoSegmentation
from acamkd.data.formats.masks import MaskDataset, MaskFolder
from acamkd.data.formats.parquet import ParquetDetection, ParquetSegmentation
from acamkd.data.formats.shards import ShardDetection, ShardSegmentation
from acamkd.data.formats.voc import VocDetection, VocSegmentation
from acamkd.data.formats.yolo import YoloDetection
from acamkd.data.image_io import lines_of, read_size
from acamkd.data.loading import ImageLoader, reading
from acamkd.data.samplers import DistributedSequentialSampler, SeededSampler
from acamkd.data.transforms import augmentation
from acamkd.data.unlabeled import WithUnlabeled

__all__ = [
    "FORMATS",
    "Box",
    "BoxDataset",
    "Cityscapes",
    "CocoDetection",
    "CocoSegmentation",
    "DistributedSequentialSampler",
    "ImageDataset",
    "ImageLoader",
    "MaskDataset",
    "MaskFolder",
    "ParquetDetection",
    "ParquetSegmentation",
    "SeededSampler",
    "ShardDetection",
    "ShardSegmentation",
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
    "compare_test",
    "lines_of",
    "loader",
    "read_size",
    "reading",
    "refuse",
    "resolve",
]

"""Data formats, one file each. FORMATS is the only table: `data.format` -> its classes, one per task."""

from collections.abc import Mapping

from acamkd.data.dataset import ImageDataset
from acamkd.data.formats.cityscapes import Cityscapes
from acamkd.data.formats.coco import CocoDetection, CocoSegmentation
from acamkd.data.formats.images import DetectionImages, SegmentationImages
from acamkd.data.formats.masks import MaskFolder
from acamkd.data.formats.parquet import ParquetDetection, ParquetSegmentation
from acamkd.data.formats.shards import ShardDetection, ShardSegmentation
from acamkd.data.formats.voc import VocDetection, VocSegmentation
from acamkd.data.formats.yolo import YoloDetection

FORMATS: Mapping[str, tuple[type[ImageDataset], ...]] = {
    "coco": (CocoDetection, CocoSegmentation),
    "yolo": (YoloDetection,),
    "voc": (VocDetection, VocSegmentation),
    "masks": (MaskFolder,),
    "cityscapes": (Cityscapes,),
    "parquet": (ParquetDetection, ParquetSegmentation),
    "shards": (ShardDetection, ShardSegmentation),
    "images": (DetectionImages, SegmentationImages),
}

"""`demo`: a first look on drawn scenes, with teachers that come with the package."""

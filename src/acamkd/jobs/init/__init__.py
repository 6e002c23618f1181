"""`init`: from a folder of images to a recipe that runs as it is."""

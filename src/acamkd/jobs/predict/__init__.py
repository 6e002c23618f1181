"""Predictions on images, videos and live streams."""

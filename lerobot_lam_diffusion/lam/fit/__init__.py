"""Fit a compact LAM of the villa-X architecture to frames; knows nothing of LeRobot's datasets."""

"""Batch keys, named like LeRobot's own (`lerobot.utils.constants`), and special values."""

OBS_LAM_TOKENS = "observation.lam_tokens"
"""LAM tokens of the observation window, float32 `(B, T, token_dim)`."""

OBS_LAM_IMAGES = "observation.lam_images"
"""Raw (not normalised) frames of the LAM's camera on their way to the LAM."""

OBS_LAM_CAMERAS = "observation.lam_cameras"
"""The policy's name of each RGB camera → the name that it had before `rename_map`: the dataset's."""

AUTO = "auto"
"""As `lam_tokens_path`: a store from the cache (`precompute/cache.py`); for a folder write `./auto`."""

VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".gif", ".3gp"),
)
"""File name endings of demonstration videos."""

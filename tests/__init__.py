TOP = "observation.images.top"  # the camera of most datasets here

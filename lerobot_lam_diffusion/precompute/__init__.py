"""LeRobot dataset → token store: decode, pair, encode, write."""

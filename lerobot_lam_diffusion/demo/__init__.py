"""PushT without a download: a planning expert, a recorder and the story of `lerobot-lam-demo`."""

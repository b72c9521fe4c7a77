"""Tokens that people can look at: one HTML page, or an episode in Rerun."""

"""Hydra configs of the command line. They are package data; nothing imports this."""

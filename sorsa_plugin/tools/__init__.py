"""Offline work on files and models: returns reports and prints nothing."""

"""Runs are killed, interrupted, damaged and starved of disk, and end with the same weights all the same."""

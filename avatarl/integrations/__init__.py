"""The objectives in other people's loops; imported on request only."""

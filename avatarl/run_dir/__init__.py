"""A run's folder: who may write it, what lies in it, and how that stays whole."""

"""Picture quality against time: chipmunk's settings and their rivals on models trained for it."""

"""A liveness sidecar for CSI storage drivers; this file holds the version and nothing else."""

__version__ = "0.1.0"

"""Multi-task architectures around any encoder: one paper, one file."""

from gradsurgery.architectures.hps import HPS

__all__ = ["HPS"]

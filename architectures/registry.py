"""Architectures by name."""

import difflib
import fnmatch
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from gradsurgery.architectures.adashare import AdaShare
from gradsurgery.architectures.architecture import Architecture
from gradsurgery.architectures.cgc import CGC
from gradsurgery.architectures.cross_stitch import CrossStitch
from gradsurgery.architectures.dselect_k import DSelectK
from gradsurgery.architectures.esmm import ESMM
from gradsurgery.architectures.hps import HPS
from gradsurgery.architectures.ltb import LTB
from gradsurgery.architectures.mmoe import MMoE
from gradsurgery.architectures.mtan import MTAN
from gradsurgery.architectures.nddr_cnn import NDDRCNN
from gradsurgery.architectures.ple import PLE
from gradsurgery.architectures.segnet_mtan import SegNetMTAN
from gradsurgery.architectures.sluice import Sluice
from gradsurgery.architectures.stages import Encoder
from gradsurgery.architectures.task_heads import TaskHeads

ARCHITECTURES: dict[str, type[Architecture]] = {
    "hps": HPS,
    "cross_stitch": CrossStitch,
    "sluice": Sluice,
    "nddr_cnn": NDDRCNN,
    "mmoe": MMoE,
    "cgc": CGC,
    "ple": PLE,
    "mtan": MTAN,
    "dselect_k": DSelectK,
    "ltb": LTB,
    "adashare": AdaShare,
    "esmm": ESMM,
    "segnet_mtan": SegNetMTAN,
    "task_heads": TaskHeads,
}


def list_architectures(pattern: str = "*") -> list[str]:
    """Names of those that `build` makes, by a shell pattern. `TaskGraph` has a description of its own.

    >>> list_architectures("*e")
    ['sluice', 'mmoe', 'ple', 'adashare']
    """
    return [name for name in ARCHITECTURES if fnmatch.fnmatch(name, pattern)]


def get_architecture(name: str) -> type[Architecture]:
    """The class of a name, whatever its case and punctuation.

    Raises:
        ValueError: an unknown name.
    """
    folded = {_fold(known): cls for known, cls in ARCHITECTURES.items()}
    if (cls := folded.get(_fold(name))) is None:
        close = difflib.get_close_matches(_fold(name), folded, n=1)
        meant = f"; did you mean {next(k for k in ARCHITECTURES if _fold(k) == close[0])!r}?" if close else ""
        raise ValueError(f"Unknown architecture {name!r}{meant} There are {list_architectures()}.")
    return cls


def build(name: str, encoder: Encoder | None, decoders: Mapping[str, nn.Module], **options: Any) -> Architecture:
    """An architecture by name.

    Args:
        name: one of `list_architectures`, whatever its case and punctuation.
        encoder: a module, which copies are copied from where several are needed, or a function that makes new ones;
            None for a design with an encoder of its own.
        decoders: task -> module.
        options: the class's keyword arguments.

    Raises:
        ValueError: an unknown name, an unknown option, an encoder too many or none.

    >>> build("MMoE", lambda: nn.Linear(4, 8), {"a": nn.Linear(8, 1)}, num_experts=2).tasks
    ('a',)
    """
    cls = get_architecture(name)
    parameters = inspect.signature(cls).parameters
    known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{cls.__name__} has no option {unknown[0]!r}: it has {known}.")
    if "encoder" not in parameters:
        if encoder is not None:
            raise ValueError(f"{cls.__name__} has an encoder of its own: pass None for the encoder.")
        return cls(decoders, **options)
    if encoder is None:
        raise ValueError(f"{cls.__name__} needs an encoder: pass a module, or a function that makes one.")
    return cls(encoder, decoders, **options)  # pyright: ignore[reportCallIssue]


def _fold(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())

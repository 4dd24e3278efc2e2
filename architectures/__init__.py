"""Multi-task architectures around any encoder: one paper, one file."""

from gradsurgery.architectures.adashare import AdaShare
from gradsurgery.architectures.architecture import Architecture, PerTask
from gradsurgery.architectures.cgc import CGC
from gradsurgery.architectures.cross_stitch import CrossStitch
from gradsurgery.architectures.dense import ASPPDecoder, dilated_resnet
from gradsurgery.architectures.dselect_k import DSelectK
from gradsurgery.architectures.esmm import ESMM
from gradsurgery.architectures.hps import HPS
from gradsurgery.architectures.ltb import LTB
from gradsurgery.architectures.mmoe import MMoE
from gradsurgery.architectures.mtan import MTAN
from gradsurgery.architectures.nddr_cnn import NDDRCNN
from gradsurgery.architectures.ple import PLE
from gradsurgery.architectures.registry import build, list_architectures
from gradsurgery.architectures.segnet import SegNet, segnet_head
from gradsurgery.architectures.segnet_mtan import SegNetMTAN
from gradsurgery.architectures.sluice import Sluice
from gradsurgery.architectures.stages import Stages, split_stages
from gradsurgery.architectures.task_graph import Concat, MTLModel, SimpleSelect, SliceSelect, TaskGraph
from gradsurgery.architectures.task_heads import TaskHeads

__all__ = [
    "CGC",
    "ESMM",
    "HPS",
    "LTB",
    "MTAN",
    "NDDRCNN",
    "PLE",
    "ASPPDecoder",
    "AdaShare",
    "Architecture",
    "Concat",
    "CrossStitch",
    "DSelectK",
    "MMoE",
    "MTLModel",
    "PerTask",
    "SegNet",
    "SegNetMTAN",
    "SimpleSelect",
    "SliceSelect",
    "Sluice",
    "Stages",
    "TaskGraph",
    "TaskHeads",
    "build",
    "dilated_resnet",
    "list_architectures",
    "segnet_head",
    "split_stages",
]

"""Methods: one paper, one file. Importing this package registers them all."""

from gradsurgery.methods.aligned_mtl import AlignedMTL
from gradsurgery.methods.cagrad import CAGrad
from gradsurgery.methods.config import ConFIG
from gradsurgery.methods.dualproj import DualProj
from gradsurgery.methods.ew import EW
from gradsurgery.methods.fairgrad import FairGrad
from gradsurgery.methods.famo import FAMO
from gradsurgery.methods.gradnorm import GradNorm
from gradsurgery.methods.gradvac import GradVac
from gradsurgery.methods.imtl import IMTL
from gradsurgery.methods.imtl_g import IMTLG
from gradsurgery.methods.krum import Krum
from gradsurgery.methods.metabalance import MetaBalance
from gradsurgery.methods.mgda import MGDA
from gradsurgery.methods.nash_mtl import NashMTL
from gradsurgery.methods.ntkmtl import NTKMTL
from gradsurgery.methods.pcgrad import PCGrad
from gradsurgery.methods.upgrad import UPGrad

__all__ = [
    "EW",
    "FAMO",
    "IMTL",
    "IMTLG",
    "MGDA",
    "NTKMTL",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradNorm",
    "GradVac",
    "Krum",
    "MetaBalance",
    "NashMTL",
    "PCGrad",
    "UPGrad",
]

"""Methods: one paper, one file. Importing this package registers them all."""

from gradsurgery.methods.aligned_mtl import AlignedMTL
from gradsurgery.methods.cagrad import CAGrad
from gradsurgery.methods.config import ConFIG
from gradsurgery.methods.conicgrad import ConicGrad
from gradsurgery.methods.constant import Constant
from gradsurgery.methods.cosmos import COSMOS
from gradsurgery.methods.db_mtl import DBMTL
from gradsurgery.methods.dualproj import DualProj
from gradsurgery.methods.dwa import DWA
from gradsurgery.methods.epo import EPO
from gradsurgery.methods.ew import EW
from gradsurgery.methods.excess_mtl import ExcessMTL
from gradsurgery.methods.fairgrad import FairGrad
from gradsurgery.methods.famo import FAMO
from gradsurgery.methods.gls import GLS
from gradsurgery.methods.go4align import GO4Align
from gradsurgery.methods.graddrop import GradDrop
from gradsurgery.methods.gradnorm import GradNorm
from gradsurgery.methods.gradvac import GradVac
from gradsurgery.methods.igb import IGB
from gradsurgery.methods.imtl import IMTL
from gradsurgery.methods.imtl_g import IMTLG
from gradsurgery.methods.imtl_l import IMTLL
from gradsurgery.methods.krum import Krum
from gradsurgery.methods.metabalance import MetaBalance
from gradsurgery.methods.mgda import MGDA
from gradsurgery.methods.moco import MoCo
from gradsurgery.methods.modo import MoDo
from gradsurgery.methods.nash_mtl import NashMTL
from gradsurgery.methods.ntkmtl import NTKMTL
from gradsurgery.methods.pbi import PBI
from gradsurgery.methods.pcgrad import PCGrad
from gradsurgery.methods.pivrg import PIVRG
from gradsurgery.methods.rlw import RLW
from gradsurgery.methods.sdmgrad import SDMGrad
from gradsurgery.methods.si import SI
from gradsurgery.methods.stch import STCH
from gradsurgery.methods.trimmed_mean import TrimmedMean
from gradsurgery.methods.upgrad import UPGrad
from gradsurgery.methods.uw import UW
from gradsurgery.methods.uw_so import UWSO

__all__ = [
    "COSMOS",
    "DBMTL",
    "DWA",
    "EPO",
    "EW",
    "FAMO",
    "GLS",
    "IGB",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "NTKMTL",
    "PBI",
    "PIVRG",
    "RLW",
    "SI",
    "STCH",
    "UW",
    "UWSO",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "ConicGrad",
    "Constant",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GO4Align",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Krum",
    "MetaBalance",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "TrimmedMean",
    "UPGrad",
]

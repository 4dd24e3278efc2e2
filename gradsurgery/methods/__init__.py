"""Methods: one paper, one file. Importing this package registers them all."""

from gradsurgery.methods.cagrad import CAGrad
from gradsurgery.methods.ew import EW
from gradsurgery.methods.famo import FAMO
from gradsurgery.methods.graddrop import GradDrop
from gradsurgery.methods.mgda import MGDA
from gradsurgery.methods.nash_mtl import NashMTL
from gradsurgery.methods.pcgrad import PCGrad
from gradsurgery.methods.trimmed_mean import TrimmedMean
from gradsurgery.methods.upgrad import UPGrad

__all__ = ["EW", "FAMO", "MGDA", "CAGrad", "GradDrop", "NashMTL", "PCGrad", "TrimmedMean", "UPGrad"]

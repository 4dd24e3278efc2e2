"""Published results on NYUv2, by protocol: what a run's table shows beside its own rows.

Each line is an architecture, a method, and mIoU, pixel accuracy (%), absolute (m) and relative depth error, mean and
median angle of the normals (degrees), and their shares under 11.25, 22.5 and 30 degrees (%).

``MTAN``: SegNet with MTAN's attention, 13 classes. Rows of Nash-MTL (Navon et al., ICML 2022, table 2), FAMO (Liu et
al., NeurIPS 2023, table 1), DB-MTL (arXiv 2308.12029, table 6) and NTKMTL (table 1), where each method's authors or the
first to run it are quoted; ``STL`` is a SegNet for each task. ``MTAN_LIBMTL``: LibMTL's own runs of the same, means
of three seeds. ``DEEPLAB``: LibMTL's runs with a dilated ResNet-50 and ASPP, one seed, the best epoch on the test set
(examples/nyu/results of https://github.com/median-research-group/LibMTL at 4336804), with MGDA and IMTL at the
representation.
"""

from collections.abc import Iterable

from gradsurgery.recipes.harness.benchmark import Row

COLUMNS = (
    "segmentation/mIoU", "segmentation/PAcc", "depth/abs", "depth/rel",
    "normal/mean", "normal/median", "normal/<11.25", "normal/<22.5", "normal/<30",
)  # fmt: skip

MTAN = """
segnet_mtan  STL          38.30 63.76 0.6754 0.2780 25.01 19.21 30.14 57.20 69.15
segnet_mtan  ew           39.29 65.33 0.5493 0.2263 28.15 23.96 22.09 47.50 61.08
segnet_mtan  si           38.45 64.27 0.5354 0.2201 27.60 23.37 22.53 48.57 62.32
segnet_mtan  rlw          37.17 63.77 0.5759 0.2410 28.27 24.18 22.26 47.05 60.62
segnet_mtan  dwa          39.11 65.31 0.5510 0.2285 27.61 23.18 24.17 50.18 62.39
segnet_mtan  uw           36.87 63.17 0.5446 0.2260 27.04 22.61 23.54 49.05 63.65
segnet_mtan  mgda         30.47 59.90 0.6070 0.2555 24.88 19.45 29.18 56.88 69.36
segnet_mtan  pcgrad       38.06 64.64 0.5550 0.2325 27.41 22.80 23.86 49.83 63.14
segnet_mtan  graddrop     39.39 65.12 0.5455 0.2279 27.48 22.96 23.38 49.44 62.87
segnet_mtan  cagrad       39.79 65.49 0.5486 0.2250 26.31 21.58 25.61 52.36 65.58
segnet_mtan  imtl_g       39.35 65.60 0.5426 0.2256 26.02 21.19 26.20 53.13 66.24
segnet_mtan  moco         40.30 66.07 0.5575 0.2135 26.67 21.83 25.61 51.78 64.85
segnet_mtan  nash_mtl     40.13 65.93 0.5261 0.2171 25.26 20.08 28.40 55.47 68.15
segnet_mtan  aligned_mtl  40.15 66.05 0.5520 0.2291 25.37 19.89 28.30 55.29 67.95
segnet_mtan  famo         38.88 64.90 0.5474 0.2194 25.06 19.57 29.21 56.61 68.98
segnet_mtan  sdmgrad      40.47 65.90 0.5225 0.2084 25.07 19.99 28.54 55.74 68.53
segnet_mtan  fairgrad     39.74 66.01 0.5377 0.2236 24.84 19.60 29.26 56.58 69.16
segnet_mtan  stch         41.35 66.07 0.4965 0.2010 26.55 21.81 24.84 51.39 64.86
segnet_mtan  db_mtl       41.42 66.45 0.5251 0.2160 25.03 19.50 28.72 56.17 68.73
segnet_mtan  go4align     40.42 65.37 0.5492 0.2167 24.76 18.94 30.54 57.87 69.84
segnet_mtan  ntkmtl       39.68 65.43 0.5296 0.2168 24.24 18.63 30.74 58.72 70.78
"""

MTAN_LIBMTL = """
segnet_mtan  ew           40.89 66.14 0.5524 0.2347 27.27 22.41 24.38 50.18 63.36
segnet_mtan  dwa          40.50 65.65 0.5358 0.2222 27.58 22.93 23.30 49.16 62.57
segnet_mtan  uw           39.34 64.88 0.5294 0.2242 26.47 21.30 25.86 52.40 65.47
segnet_mtan  mgda         29.91 60.06 0.5901 0.2432 24.55 18.63 30.49 58.02 70.14
segnet_mtan  gradnorm     40.12 65.65 0.5213 0.2180 25.50 19.84 28.46 55.39 67.85
segnet_mtan  pcgrad       40.61 65.89 0.5416 0.2287 26.97 22.05 24.68 50.90 64.05
segnet_mtan  gradvac      40.90 65.50 0.5766 0.2438 27.26 22.39 24.55 50.22 63.34
segnet_mtan  imtl         41.19 66.37 0.5323 0.2237 26.06 20.77 26.76 53.48 66.32
segnet_mtan  graddrop     40.00 65.61 0.5886 0.2517 28.05 23.54 22.81 48.01 61.33
segnet_mtan  cagrad       41.27 66.70 0.5409 0.2356 25.35 19.81 28.44 55.47 68.05
segnet_mtan  nash_mtl     40.66 66.25 0.5339 0.2266 25.11 19.59 28.70 55.97 68.52
segnet_mtan  rlw          38.82 64.45 0.5718 0.2366 28.09 23.65 22.54 47.76 61.27
segnet_mtan  moco         40.72 66.33 0.5689 0.2455 27.11 22.40 24.11 50.19 63.61
segnet_mtan  aligned_mtl  40.15 66.05 0.5520 0.2291 25.37 19.89 28.30 55.29 67.95
"""

DEEPLAB = """
hps           ew           54.1 75.78 0.3771 0.1596 23.53 17.2 34.55 60.75 72.06
hps           gradnorm     53.57 75.21 0.3853 0.1623 23.32 16.62 35.81 61.85 72.73
hps           uw           54.02 75.66 0.3838 0.1573 23.45 16.86 35.43 61.32 72.33
hps           mgda         50.15 73.44 0.3839 0.1563 22.78 16.05 37.04 63.07 73.65
hps           dwa          53.55 75.42 0.3811 0.1589 23.63 17.15 34.78 60.71 71.87
hps           gls          54.46 76.01 0.3793 0.1566 22.73 16.16 36.76 62.94 73.68
hps           pcgrad       54.03 75.66 0.3814 0.157 23.62 17.01 35.1 60.96 71.97
hps           graddrop     53.9 75.62 0.3851 0.158 23.67 17.04 34.99 60.88 71.91
hps           imtl         53.53 75.46 0.3842 0.1578 22.99 16.44 36.16 62.28 73.2
hps           gradvac      53.99 75.74 0.3842 0.1602 23.51 16.93 35.26 61.14 72.17
hps           cagrad       53.77 75.8 0.3836 0.1584 22.53 15.86 37.4 63.58 74.2
hps           nash_mtl     53.38 75.01 0.3814 0.157 22.61 15.87 37.3 63.68 74.28
hps           rlw          54.52 75.78 0.389 0.1566 23.34 16.83 35.45 61.43 72.45
cross_stitch  ew           53.14 75.24 0.3824 0.1621 23.03 16.29 36.77 62.3 72.98
cross_stitch  gradnorm     53.7 75.3 0.379 0.1591 23.12 16.5 36.3 61.95 72.77
cross_stitch  uw           53.39 75.37 0.378 0.1583 23.12 16.32 36.77 62.29 72.94
cross_stitch  mgda         53.78 75.5 0.3758 0.156 22.7 15.91 37.53 63.21 73.72
cross_stitch  dwa          52.91 75.06 0.3795 0.1577 23.19 16.42 36.61 62.02 72.72
cross_stitch  gls          53.5 75.46 0.3798 0.1576 22.52 15.73 37.9 63.6 74.02
cross_stitch  pcgrad       52.71 75.1 0.3824 0.1607 22.97 16.14 37.08 62.66 73.19
cross_stitch  imtl         53.49 75.65 0.377 0.1565 22.81 15.96 37.41 63.13 73.65
cross_stitch  gradvac      53.45 75.22 0.3787 0.157 23.25 16.54 36.34 61.76 72.51
cross_stitch  cagrad       53.69 75.17 0.3757 0.1503 22.45 15.8 37.71 63.52 74.08
cross_stitch  nash_mtl     53.17 75.12 0.3701 0.1542 22.63 15.81 37.62 63.48 73.98
cross_stitch  rlw          53.27 75.17 0.3772 0.1546 22.65 15.84 37.58 63.37 73.81
mmoe          ew           53.02 75.09 0.3884 0.1631 22.96 16.37 36.31 62.46 73.3
mmoe          gradnorm     53.09 75.07 0.3946 0.1698 22.93 16.23 36.81 62.59 73.32
mmoe          uw           53.49 75.38 0.3813 0.1605 22.76 15.99 37.23 63.16 73.74
mmoe          mgda         50.69 73.82 0.3772 0.1574 22.78 16.22 36.68 62.7 73.43
mmoe          dwa          53.18 74.7 0.3859 0.1613 23.25 16.61 35.87 61.9 72.76
mmoe          gls          53.35 75.28 0.3778 0.1576 22.54 15.77 37.7 63.65 74.12
mmoe          pcgrad       54.24 75.68 0.3832 0.1601 22.58 15.88 37.42 63.45 73.98
mmoe          imtl         53.83 75.59 0.3788 0.1601 22.79 16.16 36.88 62.78 73.46
mmoe          gradvac      52.93 75.04 0.3903 0.1565 22.89 16.04 37.0 63.03 73.57
mmoe          cagrad       53.15 74.96 0.3933 0.165 22.38 15.66 37.93 63.88 74.36
mmoe          nash_mtl     53.67 75.62 0.3885 0.1604 22.28 15.76 37.61 63.86 74.49
mmoe          rlw          53.1 74.77 0.3955 0.1696 22.32 15.51 38.29 64.15 74.42
mtan          ew           54.38 75.84 0.3764 0.1561 22.98 16.36 36.35 62.44 73.27
mtan          gradnorm     54.01 75.67 0.3838 0.1554 23.25 16.59 35.97 61.89 72.82
mtan          uw           54.01 75.75 0.3729 0.1515 23.04 16.25 36.79 62.53 73.21
mtan          mgda         51.43 74.22 0.3712 0.1508 22.2 15.3 38.79 64.73 74.89
mtan          dwa          54.82 75.93 0.378 0.1582 22.94 16.34 36.53 62.44 73.21
mtan          gls          55.16 76.34 0.3726 0.1551 22.58 15.82 37.63 63.59 74.12
mtan          pcgrad       54.63 75.95 0.381 0.1585 23.48 17.02 35.04 60.99 72.16
mtan          imtl         54.35 75.84 0.3722 0.1553 22.45 15.72 37.76 63.85 74.34
mtan          gradvac      53.65 75.59 0.3821 0.1612 23.43 17.01 35.12 61.04 72.21
mtan          cagrad       53.87 75.4 0.3815 0.1557 22.55 15.91 37.36 63.43 74.08
mtan          nash_mtl     54.78 75.85 0.3788 0.1546 22.46 15.6 38.19 64.01 74.41
mtan          rlw          55.19 76.13 0.3758 0.1568 22.79 16.05 37.11 63.08 73.7
cgc           ew           53.4 75.07 0.3897 0.165 22.17 15.41 38.5 64.47 74.76
cgc           gradnorm     53.01 75.07 0.3957 0.1653 22.17 15.42 38.45 64.51 74.81
cgc           uw           52.78 75.08 0.3832 0.1559 22.35 15.26 38.79 64.58 74.61
cgc           mgda         54.34 76.2 0.3799 0.1573 22.09 15.41 38.39 64.63 75.03
cgc           dwa          52.35 74.9 0.3992 0.1694 22.09 15.35 38.74 64.55 74.81
cgc           gls          53.36 75.38 0.3829 0.1595 22.12 15.44 38.42 64.5 74.85
cgc           pcgrad       52.9 74.98 0.3968 0.1646 22.17 15.51 38.25 64.27 74.63
cgc           imtl         52.77 75.23 0.392 0.1593 22.71 15.9 37.43 63.41 73.96
cgc           gradvac      53.06 75.01 0.4 0.1666 22.22 15.4 38.34 64.58 74.77
cgc           cagrad       53.61 74.94 0.3952 0.1644 22.18 15.47 38.26 64.41 74.77
cgc           rlw          53.42 75.21 0.3916 0.1646 21.78 15.09 39.21 65.22 75.43
ple           ew           53.22 74.89 0.4002 0.1658 22.04 15.17 38.75 65.24 75.42
ple           gradnorm     53.17 74.98 0.3809 0.1601 21.96 15.12 39.25 65.05 75.18
ple           uw           53.13 74.89 0.3767 0.1536 22.27 15.39 38.52 64.47 74.72
ple           mgda         53.55 75.42 0.3985 0.1663 22.07 15.35 38.58 64.73 75.02
ple           dwa          53.06 75.0 0.385 0.1561 21.97 15.21 38.92 64.98 75.25
ple           gls          53.28 75.33 0.3736 0.1549 22.14 15.49 38.43 64.22 74.58
ple           pcgrad       52.99 74.93 0.3848 0.1592 22.55 15.56 38.29 63.9 74.17
ple           imtl         53.48 75.58 0.3876 0.1564 21.79 15.04 39.28 65.43 75.59
ple           gradvac      53.03 74.96 0.3926 0.1594 22.02 15.36 38.72 64.52 74.86
ple           cagrad       52.76 75.11 0.3923 0.1586 22.12 15.58 38.14 64.16 74.66
ple           nash_mtl     50.8 73.84 0.3813 0.1562 22.28 15.57 37.9 64.3 74.78
ple           rlw          52.24 74.08 0.3863 0.1621 22.26 15.39 38.78 64.24 74.46
ltb           ew           52.36 74.75 0.385 0.1611 23.26 16.6 36.21 61.69 72.47
ltb           gradnorm     51.93 74.6 0.3854 0.1618 23.25 16.54 36.27 61.82 72.55
ltb           uw           52.19 74.68 0.3886 0.1576 23.32 16.47 36.46 61.81 72.42
ltb           mgda         52.85 74.68 0.3849 0.1585 22.97 16.13 37.11 62.67 73.18
ltb           dwa          52.25 74.5 0.3865 0.1579 23.39 16.7 35.95 61.45 72.21
ltb           gls          52.97 74.88 0.3797 0.1536 22.9 15.98 37.44 62.93 73.34
ltb           pcgrad       52.4 74.83 0.3847 0.16 23.26 16.58 36.17 61.76 72.55
ltb           imtl         52.74 75.08 0.3783 0.1579 22.97 16.21 36.91 62.57 73.22
ltb           gradvac      52.35 74.81 0.3817 0.1593 23.36 16.62 36.1 61.59 72.33
ltb           cagrad       53.25 75.36 0.3711 0.1567 22.65 15.94 37.42 63.22 73.79
ltb           rlw          52.62 74.6 0.3829 0.1622 22.95 15.94 37.67 62.85 73.16
dselect_k     ew           54.03 75.37 0.3854 0.1597 23.45 16.88 35.37 61.23 72.22
dselect_k     gradnorm     53.54 75.43 0.3845 0.1625 23.05 16.46 36.19 62.22 73.07
dselect_k     uw           54.34 75.55 0.3796 0.1587 23.17 16.55 36.07 61.96 72.79
dselect_k     mgda         53.88 75.72 0.3874 0.1613 22.25 15.63 37.99 63.99 74.48
dselect_k     dwa          53.59 75.02 0.3849 0.1621 22.51 15.32 38.82 64.15 74.09
dselect_k     gls          54.76 75.96 0.3801 0.1569 22.74 16.03 37.05 63.18 73.73
dselect_k     pcgrad       53.37 74.87 0.3844 0.1611 22.44 15.79 37.69 63.53 73.96
dselect_k     imtl         53.49 75.67 0.373 0.1526 22.37 15.65 37.89 64.0 74.44
dselect_k     gradvac      53.68 75.39 0.3811 0.1588 23.16 16.5 36.18 62.02 72.8
dselect_k     cagrad       53.34 75.42 0.3886 0.1616 22.61 16.06 37.07 63.15 73.89
dselect_k     nash_mtl     53.64 74.92 0.4014 0.1653 22.59 15.77 37.63 63.69 74.14
dselect_k     rlw          52.25 74.92 0.3807 0.1561 22.47 15.73 37.74 63.75 74.16
"""

TABLES = {"mtan": {"published": MTAN, "LibMTL": MTAN_LIBMTL}, "deeplab": {"LibMTL": DEEPLAB}}
BASELINES = {"mtan": ("published", "segnet_mtan", "STL"), "deeplab": ("LibMTL", "hps", "ew")}
"""what Delta-m is taken against: the papers' single-task row, and LibMTL's equal weights"""
AT_REPRESENTATION = {"deeplab": ("mgda", "imtl"), "mtan": ()}
"""methods whose published runs had `--engine representation`"""


def published(protocol: str, arch: str, methods: Iterable[str]) -> tuple[Row, ...]:
    """The baseline of Delta-m first, then what was published of these methods with this architecture.

    Args:
        protocol: ``"mtan"`` or ``"deeplab"``.
        methods: names, as `gradsurgery.list_methods` has them.
    """
    rows = {}
    for source, table in TABLES[protocol].items():
        for line in table.strip().splitlines():
            design, method, *values = line.split()
            other = "" if design == arch or method == "STL" else f"{design} "
            where = ", at the representation" if method in AT_REPRESENTATION[protocol] else ""
            name = f"{other}{method} ({source}{where})"
            rows[source, design, method] = Row(name, dict(zip(COLUMNS, map(float, values), strict=True)))
    baseline = BASELINES[protocol]
    wanted = [(source, arch, method) for method in methods for source in TABLES[protocol]]
    return tuple(rows[key] for key in dict.fromkeys([baseline, *wanted]) if key in rows)

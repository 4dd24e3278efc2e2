"""Engines: how per-task statistics are measured and weights applied. A new engine is one file and a line here."""

from gradsurgery.engines.auto import Auto
from gradsurgery.engines.batched import Batched
from gradsurgery.engines.engine import Batch, Engine, Measurement, RowMap
from gradsurgery.engines.gramian import Gramian
from gradsurgery.engines.representation import Representation
from gradsurgery.engines.rows import Rows
from gradsurgery.engines.rules import LayerRule, gramian_rule
from gradsurgery.engines.sequential import Sequential
from gradsurgery.engines.subset import Subset
from gradsurgery.registry import closest

__all__ = [
    "ENGINES",
    "Auto",
    "Batch",
    "Batched",
    "Engine",
    "Gramian",
    "LayerRule",
    "Measurement",
    "Representation",
    "RowMap",
    "Rows",
    "Sequential",
    "Subset",
    "gramian_rule",
    "make_engine",
]

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (Sequential, Batched, Gramian, Representation)}


def make_engine(engine: str | Engine, *, rows: bool = False) -> Engine:
    """The engine of that name, with its default options.

    Args:
        engine: a name, ``"auto"``, or an engine.
        rows: whether the gradients themselves are wanted, which ``"auto"`` goes by.

    Raises:
        ValueError: no such engine; the message lists the close names.
        TypeError: neither a name nor an engine.
    """
    if isinstance(engine, Engine):
        return engine
    if not isinstance(engine, str):
        raise TypeError(f"engine must be a name or an Engine; got {type(engine).__name__}.")
    if engine == "auto":
        return Auto(rows=rows)
    if engine not in ENGINES:
        raise ValueError(f"There is no engine named {engine!r}. {closest(engine, ['auto', *ENGINES])}")
    return ENGINES[engine]()

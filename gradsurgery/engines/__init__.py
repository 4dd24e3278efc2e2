"""Engines: how per-task statistics are measured and weights applied. A new engine is one file and a line here."""

from gradsurgery.engines.engine import Engine, Measurement, RowMap
from gradsurgery.engines.sequential import Sequential
from gradsurgery.registry import closest

__all__ = ["ENGINES", "Engine", "Measurement", "RowMap", "Sequential", "make_engine"]

ENGINES: dict[str, type[Engine]] = {"sequential": Sequential}


def make_engine(engine: str | Engine) -> Engine:
    """The engine of that name, with its default options; ``"auto"`` is ``"sequential"``, which takes any model.

    Raises:
        ValueError: no such engine; the message lists the close names.
        TypeError: neither a name nor an engine.
    """
    if isinstance(engine, Engine):
        return engine
    if not isinstance(engine, str):
        raise TypeError(f"engine must be a name or an Engine; got {type(engine).__name__}.")
    name = "sequential" if engine == "auto" else engine
    if name not in ENGINES:
        raise ValueError(f"There is no engine named {engine!r}. {closest(engine, ['auto', *ENGINES])}")
    return ENGINES[name]()

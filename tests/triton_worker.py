"""Runs kernels under Triton's interpreter, which has to be chosen before Triton is imported: in a process of its own.

    TRITON_INTERPRET=1 python triton_worker.py problems.pt answers.pt

``problems.pt`` holds a list of (operator, arguments); what each returned goes to ``answers.pt``.
"""

import sys
from typing import Any

import torch
from triton.runtime import interpreter

from gradsurgery.solvers import device

BODIES = {**device.BODIES, "pcgrad": device.pcgrad, "gradvac": device.gradvac}


patched: set[str] = set()


def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """A helper's call, with the interpreter's patching once a module and launch: at every call it is half the time."""
    if self.fn.__module__ not in patched:
        interpreter._patch_lang(self.fn)
        patched.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


def solve(name: str, arguments: tuple[Any, ...]) -> Any:
    patched.clear()
    return BODIES[name](*arguments)


if __name__ == "__main__":
    interpreter.InterpretedFunction.__call__ = call
    problems = torch.load(sys.argv[1])
    torch.save([solve(*problem) for problem in problems], sys.argv[2])

"""The list of lines that only a CUDA device reaches is what the code says, short, and each of them accounted for."""

from __future__ import annotations

import ast

import cuda_only_lines
from cuda_only_lines import ROOT, found, listed

MOST_WITHOUT_A_TEST = 12
SAMPLE = """
def f(x, device):
    if device.type != "cuda" or x is None:
        return 1
    y = 2
    if x.is_cuda and y:
        y = 3
    else:
        y = 4
    return y

def g(x):
    if not x.is_cuda:
        a = 5
    else:
        a = 6
    with torch.cuda.stream(a):
        b = 7
    if torch.cuda.is_available() or x:
        b = 8
"""


def test_branches_are_read_as_python_runs_them():
    lines = [
        (function, ast.unparse(statement).splitlines()[0])
        for function, statement in cuda_only_lines._statements(ast.parse(SAMPLE))
    ]
    assert lines == [
        ("f", "y = 2"), ("f", "if x.is_cuda and y:"), ("f", "y = 3"), ("f", "y = 4"), ("f", "return y"),
        ("g", "a = 6"), ("g", "with torch.cuda.stream(a):"),
    ]  # fmt: skip


def test_the_list_is_what_the_code_says():
    """Where this fails: python bench/cuda_only_lines.py says what to add to, or take out of, cuda_only_lines.txt."""
    assert listed().keys() == found().keys()


def test_every_line_has_a_test_or_a_reason():
    untested = 0
    for line, who in listed().items():
        if who.startswith("no test: "):
            untested += 1
            assert len(who) > 30, line
        else:
            assert list(ROOT.glob(who)), f"{line}: {who} is not there"
    assert untested <= MOST_WITHOUT_A_TEST

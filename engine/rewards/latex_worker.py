"""The worker behind `latex.py`, run as a script: JSON questions on stdin, JSON replies on stdout, one per line.

math-verify reads the expressions and takes sets, intervals, matrices and relations apart. Left to itself it compares to
6 or 15 digits, takes `xy = 7` for 7 and `R` for `r`, drops units, and solves relations (neither `x^2 = -1` nor
`x^2 = -2` has a solution, so they are equal). Here two values are equal where their difference is proven to be 0,
decimals being fractions; two relations where one is a multiple of the other; an equation equals no value.

Its alarm is left at the default action, so that the kernel ends it even in the midst of a long multiplication.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

START_LIMIT_S = 120.0
MEMORY_LIMIT = 4 << 30


def guard() -> None:
    """Makes sure that this process ends: by its alarm, by its memory limit, but not by a Ctrl-C meant for the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT_S)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def serve() -> None:
    """Answers questions until stdin is closed."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, sys.stdout.fileno())
    os.dup2(silence, sys.stderr.fileno())
    logging.disable(logging.CRITICAL)
    try:
        from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
        from latex2sympy2_extended.latex2sympy2 import ConversionConfig
        from math_verify import grader
    except ImportError as error:
        replies.write(json.dumps({"error": str(error)}) + "\n")
        return

    grader.sympy_numeric_eq = lambda a, b, *_: same_value(a, b)
    grader.sympy_symbolic_eq = lambda a, b: False
    grader.sympy_solve_and_compare = lambda a, b, *_: are_multiples(a, b)
    spelling = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    meaning = ConversionConfig(lowercase_symbols=False)

    def read(text: str, is_real: bool):
        text = normalize_latex(re.sub(r"(\d*)\.(\d+)", as_fraction, text), spelling)
        return latex2sympy(text, is_real=is_real, normalization_config=None, conversion_config=meaning)

    def is_equal(truth: str, predicted: str) -> bool:
        is_real = not grader.should_treat_as_complex(f"{truth} {predicted}")
        try:
            sides = read(truth, is_real), read(predicted, is_real)
        except Exception:  # of many kinds: not LaTeX that it can read
            return False
        if any(what(sides[0]) != what(sides[1]) for what in (grader.is_equation, count_repeats)):
            return False
        return grader.verify(*sides, timeout_seconds=None, allow_set_relation_comp=True)

    replies.write(json.dumps({"error": None}) + "\n")
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question["limit_s"])
        equal = is_equal(question["truth"], question["predicted"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps({"equal": bool(equal)}) + "\n")


def as_fraction(decimal: re.Match) -> str:
    """0.333 is 333/1000, not what a float holds."""
    return rf"\frac{{{decimal[1]}{decimal[2]}}}{{1{'0' * len(decimal[2])}}}"


def same_value(a, b) -> bool:
    """Whether two sympy expressions, or the elements of two matrices, are proven equal."""
    if hasattr(a, "shape") or hasattr(b, "shape"):
        a, b = a.doit(), b.doit()
        return getattr(a, "shape", 0) == getattr(b, "shape", 1) and all(map(same_value, a, b))
    difference = (a - b).doit()
    if difference.is_zero or is_apart(difference):
        return bool(difference.is_zero)
    return difference.simplify().is_zero is True or difference.equals(0) is True


def count_repeats(side) -> int:
    """How many elements of a list `1, 1, 2` are there a second time."""
    return len(side._unsorted_args) - len(side.args) if hasattr(side, "_unsorted_args") else 0


def is_apart(difference) -> bool:
    """Whether it is proven not to be 0: at one point, some digits of it are known, however small it is."""
    from sympy import Rational

    names = sorted(difference.free_symbols, key=str)
    point = {name: Rational(17 + 10 * n, 7 + 2 * n) for n, name in enumerate(names)}
    parts = difference.subs(point).evalf(5, maxn=400).as_real_imag()
    return any(part.is_Float and part._prec > 1 and part != 0 for part in parts)


def are_multiples(a, b) -> bool:
    """Whether one relation, `l = r` or `l < r`, is the other one times a number."""
    ratio = ((a.lhs - a.rhs) / (b.lhs - b.rhs)).simplify()
    if ratio.free_symbols or ratio.is_finite is not True or ratio.is_zero is not False:
        return False
    turned = type(a) is not type(b)
    return a.rel_op in ("==", "!=") and not turned or bool(ratio.is_negative if turned else ratio.is_positive)


if __name__ == "__main__":
    guard()
    serve()

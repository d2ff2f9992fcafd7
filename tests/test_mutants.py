"""Planted bugs (`make mutants`): the rules change what they say, no line of the kernels is left out, and the record and
its page keep the promise."""

import json
import re
from collections import Counter

import pytest

import mutants
from mutants import COUNT, EQUIVALENT, FILES, LAST, PAGE, QUICK, RESULTS, ROOT, RULES, THOROUGH

in_source_tree = pytest.mark.skipif(not (ROOT / "src_c").exists(), reason="not a source tree")
recorded = pytest.mark.skipif(not RESULTS.exists() or not PAGE.exists(), reason="not a source tree")

# (rule, line before, line after): one that the rule must give
C = [
    ("sign", "y = (x - mean) * scale;", "y = (x + mean) * scale;"),
    ("sign", "sum[k] += d;", "sum[k] -= d;"),
    ("operator", "return i * stride;", "return i / stride;"),
    ("bound", "for (int i = 0; i < n; i++) {", "for (int i = 0; i <= n; i++) {"),
    ("comparison", "return a == b;", "return a != b;"),
    ("condition", "if (f(a) && b) {", "if (!(f(a) && b)) {"),
    ("condition", "return a && b;", "return a || b;"),
    ("constant", "EACH(j, 8) sum[j] += sum[j + 8];", "EACH(j, 8) sum[j] += sum[j + 9];"),
    ("lane", "values[k] = y;", "values[0] = y;"),
    ("lane", "x += FASTBN_LANES;", "x += (FASTBN_LANES / 2);"),
    ("tail", "n = least(first + strip, rows);", "n = (rows);"),
    ("tail", "store_head(p, v, n);", "store_head(p, v, n + 1);"),
    ("block", "for (; row < rows; row++) {", "for (; row < (rows + 1); row++) {"),
    ("term", "return a * b + c * d;", "return a * b;"),
    ("factor", "return a + b * c;", "return a + b;"),
    ("swapped operands", "return a - b;", "return b - a;"),
    ("other name", "b = outer + inner;", "b = inner + inner;"),
    ("statement", "fence();", ";"),
    ("order", "a = b;\nb = c;", "b = c;\na = b;"),
]
CYTHON = [
    ("bound", "for k in range(job.fold):", "for k in range(job.fold - 1):"),
    ("condition", "if job.packed:", "if not (job.packed):"),
    ("condition", "n = 1 if planar else 2", "n = 1 if not (planar) else 2"),
    ("operator", "row = block // n", "row = block * n"),
    ("statement", "cut(job)", "pass"),
]


@pytest.mark.parametrize(
    ("path", "rule", "before", "after"), [("a.h", *c) for c in C] + [("a.pxi", *c) for c in CYTHON], ids=str
)
def test_mutants_of_a_rule(path, rule, before, after):
    found = mutants.mutants_of(path, before + "\n")
    assert after in [mutant.after for mutant in found if mutant.rule == rule]


def test_mutants_every_rule_has_an_example():
    assert {rule for rule, *_ in C} == set(RULES)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a.h", "/* a - b */\n#if A < B\n#endif\nassert(a < b);\ntypedef struct s {\n    int x, y;\n} s;\n"),
        ("a.h", "INLINE int f(const char *row, int n)\n{\n}\n"),
        (
            "a.pxi",
            '# a - b\nfrom a cimport b\ncdef int64_t row, rows\n"""a - b"""\ncdef struct S:\n    int row, rows\n',
        ),
        ("a.pxi", "cdef void f(Job *job, int row) noexcept nogil:\n"),
    ],
)
def test_mutants_leave_comments_and_declarations(path, text):
    assert mutants.mutants_of(path, text) == []


@in_source_tree
def test_mutants_are_planted_in_their_line_only():
    for path in FILES:
        text = (ROOT / path).read_text()
        found = mutants.mutants_of(path, text)
        assert len(set(found)) == len(found)
        for mutant in found[::50]:
            before, after = text.split("\n"), mutants.planted(mutant, text).split("\n")
            different = [i + 1 for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
            assert set(different) <= {mutant.line, mutant.line + 1} and different


# What a line of code may look like for which no rule has a mutant.
WITHOUT = re.compile(
    r"[{}();, ]*(else|enum|do|return( \w+|\*this)?|break|pass|nothing)?:?[{}();, ]*"
    r"|\} else \{|(default|case [\w#]+): *(return .*)?|return [\w()]+[({].*|EACH\(\w+, .*\) \{|switch .*"
    r"|[a-zA-Z_#()]+[#\w]*[(),;]*|enum \{?|cdef enum:|cdef .*=.*|cdef [\w ]+\[\w+\]|static (const|inline) .*|INLINE .*"
    r"|__builtin_shuffle.*|(KNOWN_CASE|AS_KNOWN|VECTORS)\(.*|case usual: \{|vec_f64 e ="
    r"|\.\w+ = .*,|[\w.]+\($|extern .*|.*JOIN.*|.*_bits16.*|&?\w+,|A\(select\).*|NUMBER\(.*"
)


@in_source_tree
@pytest.mark.parametrize("path", [path for path in FILES if "dispatch" not in path])  # tables
def test_mutants_reach_every_line(path):
    """But those which only declare, name, open, close or return."""
    text = (ROOT / path).read_text()
    reached = {
        mutant.line + i for mutant in mutants.mutants_of(path, text) for i in range(mutant.before.count("\n") + 1)
    }
    code = mutants.code_of(path, text)
    left = [line.rstrip("\\ ").strip() for i, line in enumerate(code) if line.strip() and i + 1 not in reached]
    assert [line for line in left if not WITHOUT.fullmatch(line)] == []


@in_source_tree
def test_mutants_are_drawn_by_the_seed_from_every_file_and_rule():
    quotas = mutants.quotas()
    assert sum(quotas.values()) == COUNT and min(quotas.values()) >= 5
    path = FILES[1]
    found = mutants.mutants_of(path, (ROOT / path).read_text())
    order = mutants.in_turn(found, 1)
    assert order == mutants.in_turn(found, 1) != mutants.in_turn(found, 2)
    assert sorted(order) == sorted(found)
    assert {mutant.rule for mutant in order[: len(RULES)]} == {mutant.rule for mutant in found}


@in_source_tree
def test_mutants_meet_tests_that_exist():
    for test in {**QUICK, **THOROUGH, **LAST}:
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), test


@recorded
def test_mutants_of_the_record_are_found():
    results = json.loads(RESULTS.read_text())
    entries = results["mutants"]
    assert len(entries) == COUNT
    assert {entry["rule"] for entry in entries} == set(RULES)
    assert min(Counter(entry["file"] for entry in entries).values()) >= 5
    assert mutants.share_found(entries) >= 0.98
    for entry in entries:
        verdict = entry["verdict"]
        assert verdict in ("survived", "equivalent") or re.match(
            r"(caught by|timeout in|crash \(SIG\w+\) in) ", verdict
        )
        if verdict == "equivalent":
            assert entry["argument"] == EQUIVALENT[mutants.key(entry["before"], entry["after"])]


def test_mutants_arguments_are_read():
    assert len(EQUIVALENT) == mutants.ARGUMENTS.count("\n- ") == mutants.ARGUMENTS.count("\n= ")
    assert all(before != after and argument.endswith(".") for (before, after), argument in EQUIVALENT.items())


@recorded
def test_mutants_page_is_that_of_the_record():
    assert PAGE.read_text() == mutants.page(json.loads(RESULTS.read_text()))


def test_mutants_share_counts_survivors_and_leaves_equivalents_out():
    verdicts = ["caught by a", "crash (SIGSEGV) in a", "timeout in a", "survived", "equivalent"]
    assert mutants.share_found([{"verdict": verdict} for verdict in verdicts]) == 0.75

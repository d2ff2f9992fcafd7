"""What a planted bug may be: rules that change one place of one line of C or Cython, or the order of two statements."""

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

PAREN = r"\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)"
OPERAND = rf"(?<![\w.])(?:(?:[A-Z]\(\w+\)|[A-Za-z_][\w.]*(?:->\w+)*)(?:{PAREN})?(?:\[[^][]*\])?|\d[\w.]*|{PAREN})"
ARGUMENT = r"(?:[^,()]+|[^,()]*\([^()]*\)[^,()]*)"
# Names that a tired author takes for one another.
TWINS = (
    "rows columns, row channel, row column, outer inner, block row, channel column, first last, first second, hi lo, "
    "mean mean_lo, center off_center, level off_level, level rest, CENTER LEVEL, OFFSET REST, sum product, sum lost, "
    "total squares, x dy, x residual, y dx, dx dresidual, source destination, map reduce, SCALE "
    "OFFSET, scale offset, delta square, dgamma dbeta, gamma beta, units map_units, group groups, fold channels, "
    "width channels, mean var, applied summed, count columns, scale beta, where_open where_shut, low high, yes no, "
    "least greatest, sum_g sum_gd, b next, map_asks reduce_asks, MEAN MEAN_LO, RSTD RSTD_LO, total lost, "
    "larger smaller, previous channels, each here, grains groups"
)
PAIRS = [tuple(pair.split()) for pair in TWINS.split(",")]

# (rule, pattern, replacement)
PATTERNS: list[tuple[str, str, str]] = [
    ("sign", r"(?<=[\w)\]] )\+(?= )", "-"),
    ("sign", r"(?<=[\w)\]] )-(?= )", "+"),
    ("sign", r"\+=", "-="),
    ("sign", r"-=", "+="),
    ("operator", r"(?<=[\w)\]] )\*(?= [\w(])", "/"),
    ("operator", r"(?<=[\w)\]] )//?(?= [\w(])", "*"),
    ("operator", r"(?<=[\w)\]] )%(?= [\w(])", "/"),
    ("operator", r"\*=", "/="),
    ("operator", r"/=", "*="),
    ("operator", r"<<", ">>"),
    ("operator", r">>", "<<"),
    ("operator", r" & ", " | "),
    ("operator", r" \| ", " & "),
    ("operator", r"~", ""),
    ("bound", r" < ", " <= "),
    ("bound", r" <= ", " < "),
    ("bound", r" > ", " >= "),
    ("bound", r" >= ", " > "),
    ("bound", r"range\((\w+), ", r"range(\1 + 1, "),
    ("bound", r"range\(([^,()]+)\)", r"range(\1 - 1)"),
    ("comparison", r" <=? ", " > "),
    ("comparison", r" >=? ", " < "),
    ("comparison", r" == ", " != "),
    ("comparison", r" != ", " == "),
    ("condition", rf"\b(if|while) ({PAREN})", r"\1 (!\2)"),
    ("condition", r"\b(if|while) ([^(].*?):", r"\1 not (\2):"),
    ("condition", r" if (.+?) else ", r" if not (\1) else "),
    ("condition", r" \? ([^?:;]+) : ([^?:;,)]+)", r" ? \2 : \1"),
    ("condition", r" && ", " || "),
    ("condition", r" \|\| ", " && "),
    ("condition", r" and ", " or "),
    ("condition", r" or ", " and "),
    ("condition", r"\bnot ", ""),
    ("condition", r"\bTrue\b", "False"),
    ("condition", r"\bFalse\b", "True"),
    ("constant", r"(?<![\w.])(?:0x[0-9a-f]+|\d+)u?(?![\w.])", "{+1}"),
    ("constant", r"(?<![\w.])(?:0x[0-9a-f]+|[1-9]\d*)u?(?![\w.])", "{-1}"),
    ("constant", r"(?<![\w.])\d+\.\d+(?![\w.])", r"(2 * \g<0>)"),
    ("lane", r"\[[ik]\]", "[0]"),
    ("lane", r"\bk \* ", ""),
    ("lane", r"\b(FASTBN_LANES|F\((?:WIDTH|WIDE_TILE|PARTS)\)|LANE_VECTORS|TILE_VECTORS|TILE)(?!\w)", r"(\1 / 2)"),
    ("lane", r"\bWIDTH_f64\b", "WIDTH_f32"),
    ("tail", rf"\b(?:clamp|least|min|max)\(({ARGUMENT}), ({ARGUMENT})\)", r"(\1)"),
    ("tail", rf"\b(?:clamp|least|min|max)\(({ARGUMENT}), ({ARGUMENT})\)", r"(\2)"),
    ("tail", r", n\)", ", n - 1)"),
    ("tail", r", n\)", ", n + 1)"),
    ("tail", r"\bkeep_head_f64\((.+), n\)", r"(\1)"),
    ("tail", r"\bwhole\b", "1"),
    ("block", r"\b((?:\w+\.|\w+->)*\w*(?:block|rows|columns|segments|fold|group|units|plane|step|piece|strip|PIECE"
              r"|LANE_CHANNELS|_VALUES|_COLUMNS|_BYTES|_SUMS))\b(?= [-+*/%<>,]|[,);])", r"(\1 + 1)"),
    ("term", rf" [-+] {OPERAND}(?: [*/]/? {OPERAND})*", ""),
    ("factor", rf" [*/%]/? {OPERAND}", ""),
    ("factor", rf"{OPERAND} \* ", ""),
    ("swapped operands", rf"({OPERAND}) (-|//?|<<|>>|%) ({OPERAND})", r"\3 \2 \1"),
    *(("other name", rf"(?<!\w)(?<!F\()((?:FASTBN_|STATISTICS_)?){a}\b", rf"\g<1>{b}")
      for pair in PAIRS for a, b in (pair, pair[::-1])),
]  # fmt: skip
RULES = (*dict.fromkeys(rule for rule, _, _ in PATTERNS), "statement", "order")


class Mutant(NamedTuple):
    file: str
    line: int
    rule: str
    before: str
    after: str


def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def code_of(path: str, text: str) -> list[str]:
    """The lines of a source with everything blanked that is not mutated: comments, texts, asserts, all for the
    preprocessor but the bodies of macros, and struct members."""
    if path.endswith(".pxi"):
        code = re.sub(r'"""[\s\S]*?"""|"[^"\n]*"|#[^\n]*', blank, text)
        code = re.sub(r"^(from|include|import|cdef extern|ctypedef) ?.*", blank, code, flags=re.M)
        code = re.sub(r"^ *cdef [\w* ]+(\[\w+\])?(, \w+)*$", blank, code, flags=re.M)
        code = re.sub(r"^cdef [^\n]*\((?:[^\n]*\n +)*?[^\n]*\) noexcept nogil:$", blank, code, flags=re.M)
        code = re.sub(r"^cdef struct.*\n(?:(?: +.*)?\n)*", blank, code, flags=re.M)
    else:
        code = re.sub(r'/\*[\s\S]*?\*/|//[^\n]*|"[^"\n]*"', blank, text)
        code = re.sub(r"^ *#(?:define \w+\([^)\n]*\)|define \w+|(?:[^d\n]|d(?!efine))[^\n]*)", blank, code, flags=re.M)
        code = re.sub(r"\b(_Static_)?assert\(.*?\);", blank, code)
        code = re.sub(r"^(INLINE|static|extern|[a-z_0-9]+ [*\w]+\()[^;{}]*?\n(?=\{)", blank, code, flags=re.M)
        code = re.sub(r"^ *(INLINE|extern) .*", blank, code, flags=re.M)
        code = re.sub(r"^typedef struct .*\{\n(?: .*\n)*\}.*;|^typedef .*;", blank, code, flags=re.M)
    return code.split("\n")


def statements(path: str, code: list[str]) -> set[int]:
    """Indices of lines that are one whole statement."""
    found = set()
    depth, ended = 0, True
    for i, line in enumerate(code):
        text = line.rstrip("\\ ").strip()
        if not text:
            continue
        if path.endswith(".pxi"):
            starts = depth == 0
            depth += len(re.findall(r"[(\[]", text)) - len(re.findall(r"[)\]]", text))
            if starts and depth == 0 and not re.match(r"(cdef|return|pass|if|for|while|else)\b", text):
                found.add(i)
        else:
            if ended and text.endswith(";") and not re.match(r"(return|break|case|static|extern|default)\b", text):
                found.add(i)
            ended = text[-1] in ";{}:"
    return found


def depend(one: str, other: str) -> bool:
    """Whether a statement uses what the other sets; a call may set anything."""

    def sets(code: str) -> set[str]:
        assignment = re.match(r"(.*\w[^=]*?) [-+*/|&]?= ", code)
        names = re.sub(r"\[.*?\]", "", assignment[1]) if assignment else code
        return set(re.findall(r"\w+$" if assignment else r"\w+", names))

    return any(sets(a) & set(re.findall(r"\w+", b)) for a, b in ((one, other), (other, one)))


def changed(pattern: str, replacement: str, line: str, code: str) -> Iterator[str]:
    """The line with the pattern replaced, once for each place where the code has it."""
    at = 0
    while match := re.compile(pattern).search(code, at):
        number = re.fullmatch(r"\{(.*)\}", replacement)
        if number:
            text = match[0].rstrip("u")
            value = str(int(text, 0) + int(number[1])) if "x" not in text else hex(int(text, 0) + int(number[1]))
            new = value + match[0][len(text) :]
        else:
            new = match.expand(replacement)
        yield line[: match.start()] + new + line[match.end() :]
        at = match.start() + 1


@cache
def mutants_of(path: str, text: str) -> list[Mutant]:
    """All of a file, in the order of lines."""
    lines, code = text.split("\n"), code_of(path, text)
    whole = statements(path, code)
    found: dict[tuple[int, str], Mutant] = {}
    nothing = "pass" if path.endswith(".pxi") else ";"

    def add(i: int, rule: str, before: list[str], after: list[str]) -> None:
        if before != after:
            key = (i, "\n".join(after))
            found.setdefault(key, Mutant(path, i + 1, rule, "\n".join(before), "\n".join(after)))

    for i, line in enumerate(lines):
        nearby = set(re.findall(r"\w+", " ".join(code[max(0, i - 20) : i + 20])))
        for rule, pattern, replacement in PATTERNS:
            for after in changed(pattern, replacement, line, code[i]):
                if rule != "other name" or nearby.issuperset(re.findall(r"\w+", after)):
                    add(i, rule, [line], [after])
        if i in whole:
            add(i, "statement", [line], [line.replace(code[i].rstrip("\\ ").strip(), nothing)])
            indent = len(line) - len(line.lstrip())
            follows = i + 1 in whole and len(lines[i + 1]) - len(lines[i + 1].lstrip()) == indent
            if follows and depend(code[i], code[i + 1]):
                add(i, "order", lines[i : i + 2], lines[i : i + 2][::-1])
    return list(found.values())


def planted(mutant: Mutant, text: str) -> str:
    """The text of its file with the mutant in it."""
    lines = text.split("\n")
    before = mutant.before.split("\n")
    assert lines[mutant.line - 1 :][: len(before)] == before
    lines[mutant.line - 1 : mutant.line - 1 + len(before)] = mutant.after.split("\n")
    return "\n".join(lines)

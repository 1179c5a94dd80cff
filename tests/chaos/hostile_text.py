"""Owns hostile strings: what would run a command, add a line or an option, or pass for something else, if it could."""

import random

MARK = "%CANARY%"
"""Stands in a string for the file whose appearance proves that a part of it was run."""

COMMANDS = (f">{MARK}", f"touch {MARK}", f": >{MARK}", f"echo >{MARK}")

WRAPS = (
    *("$({})", "`{}`", "$(({}))", "${{x:-$({})}}", "${{x:=`{}`}}", "${{x@P}}$({})", "$[{}]", "a[$({})]", "<({})"),
    *(">({})", ";{};", "|{}|", "&{}&", "||{}||", "&&{}&&", "\n{}\n", "\r\n{}\r\n", "\r{}\r", ";;{}", "({})"),
    *("{{ {}; }}", "!{}", "';{};'", '";{};"', "'$({})'", '"$({})"', "'\n{}\n'", '"\n{}\n"', "\\';{};\\'"),
    *("'\"'\"';{};'\"'\"'", "$'\\n{}'", "\\\n{}", "\\$({})", "\\`{}\\`", "$\\({})", "\\\\$({})", "''$({})''"),
    *("\u2028{}\u2028", "\u2029{}", "\x85{}", "\x0b{}", "\x00{}", "\x00\n{}\n", "\x1b[2K{}", "\x7f{}", "\x08{}"),
    *("\u202e{}\u202c", "\ufeff{}", "\u200b;{}", "\ud800{}", "＄({})", "｀{}｀", "；{}；", "'{}'", "ʼ;{};ʼ", "“;{};“"),
    *("$( {}", "` {}", "#\n{}", " # {}", "{{{{token}}}};{}", "EOF\n{}\n", "MANIFEST\n{}\n", "\n#SBATCH --wrap='{}'"),
    *("\n#PBS -v X=`{}`", "\n#SBATCH --job-name=x\n{}"),
)
"""`{}` is where the command goes."""

WORDS = (
    *("", " ", "  ", "\t", "-", "--", "---", "-x", "--output=/x", "-o x", "-oProxyCommand=x", "--export=ALL"),
    *("--no-x", "--wrap=x", "-W block=true", "-J 1-9", "-l select=9", "-N x", "+x", "=x", ":", ":x", "@x", "x@y:z"),
    *("%x%j", "~", "~/", "~root", "$HOME", "${HOME}", "$PATH/x", "$", "$$", "$1", "$@", "$*", "$?", "$!", "${"),
    *("${}", "${x", "${x}}", "$x$", "${#x}", "${x//a/b}", "${!x}", "${x@P}", "${x:0}", "*", "?", "[a-z]", "{a,b}"),
    *("{1..9}", "!", "!!", "!x", "^a^b", "#", "#x", "\\", "\\\\", "'", '"', "`", "''", '""', "'\"", "$'x'", '$"x"'),
    *("<", ">", ">>", "<<x", "<<<x", "2>&1", "&", "|", ";", "&&", "||", "(", ")", "()", "x() {", "{", "}", "{{"),
    *("}}", "{{token}}", "{{ directives }}", "{{run}}", "{%x%}", "{{unknown}}", "{{7*7}}", "${7*7}", "<%= 7*7 %>"),
    *("{0}", "{x}", "%s", "%n", "%(x)s", "\n", "\r", "\r\n", "\x00", "\x1b", "\x1b]0;x\x07", "\x7f", "\x80", "\x85"),
    *("\x9b", "\xa0", "\xad", "\u200b", "\u200e", "\u2028", "\u2029", "\u202e", "\u2066", "\ufeff", "\ufffe"),
    *("\ud800", "\udfff", "\U000e0041", "é", "é", "ß", "İ", "中", "🙂", "../", "../..", "/", "//", "/../"),
    *("/etc/passwd", "/dev/null", "/proc/self/environ", ".", "..", "a b", "a\tb", "a,b", "a:b", "a=b", "a;b", "0"),
    *("-1", "1e999", "NaN", "true", "null", "x" * 300, "x" * 5000, "exec", "exit", "eval", "source x", "#SBATCH"),
    *("#PBS",),
)

SOFT = (
    *(
        " ",
        "  ",
        "(",
        ")",
        "(x)",
        "()",
        "{a,b}",
        "{1..3}",
        "{",
        "}",
        "}}",
        "!",
        "!!",
        "#",
        " # x",
        "%",
        "%s",
        "=",
        "a=b",
        "+x",
        "-x",
    ),
    *(
        "~",
        " ~",
        ":",
        ",",
        "@",
        "^",
        "[",
        "]",
        "[a-z]",
        "$HOME",
        "${HOME}",
        "$PATH",
        "$USER",
        "é",
        "中",
        "🙂",
        "＄(x)",
        "｀x｀",
        "；",
        "/",
        "//",
    ),
)
"""What most fields for paths and words take."""


def hostile(chance: random.Random, benign: str) -> str:
    """A string: a harmless value that something is put into, before, behind or in place of."""
    if chance.random() < 0.3:
        made = "".join(chance.choice((*SOFT, *COMMANDS[1:2])) for _ in range(chance.randrange(1, 6)))
    else:
        made = _piece(chance)
    for _ in range(chance.choice((0, 0, 0, 0, 1, 2))):
        made += _piece(chance)
    if chance.random() < 0.1:
        made += "".join(chr(chance.choice((chance.randrange(0x80), chance.randrange(0x3000)))) for _ in range(5))
    place = chance.randrange(len(benign) + 1)
    before, behind = chance.choice(((benign, ""), ("", benign), (benign[:place], benign[place:]), ("", "")))
    return before + made + behind


def _piece(chance: random.Random) -> str:
    if chance.random() < 0.6:
        return chance.choice(WRAPS).format(chance.choice(COMMANDS))
    return chance.choice(WORDS)

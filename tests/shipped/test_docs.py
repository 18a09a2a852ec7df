"""The documents: every command is valid, every path and link exists, the README is short."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sfed.bench import __main__ as bench
from sfed.chat import __main__ as chat
from sfed.config import load as config_load
from sfed.config import own_method
from sfed.config.schema import Config
from sfed.data.forms.prompts import INSTRUCTION, INSTRUCTION_WITH_INPUT, PAIR, QUESTION, TEXT
from sfed.doctor import __main__ as doctor
from sfed.eval import __main__ as evaluation
from sfed.export import __main__ as export
from sfed.methods import method as methods
from sfed.observability import logs
from sfed.plan import __main__ as plan
from sfed.report import __main__ as report
from sfed.sweep import grid
from sfed.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "llms.txt")),
    ROOT / "launch" / "README.md",
    ROOT / "configs" / "README.md",
    ROOT / "tests" / "README.md",
    *sorted(DOCS.glob("*.md")),
]
OF_A_READER = ("/workspace/my.yaml", "methods.yaml", "diagnosis.yaml")
"""Files that a reader writes; those that are shown on their page are checked from there."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def inline(page: Path) -> list[str]:
    """Commands within the text, without those that hold a placeholder such as FILE or ...

    A command's name alone, such as ``sfed plan``, is no call of it.
    """
    outside = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(
        r"`((?:[A-Z_]+=\S+ )*(?:python|sfed \w+|torchrun|deepspeed|pytest) [^`]*)`", outside
    )
    placeholder = re.compile(r"(?:^| )(?:\.\.\.|\[|[A-Z]+(?:[ ./]|$)|\S*/[A-Z]+(?: |$))")
    return [line for line in found if not placeholder.search(line)]


def split(script: str) -> list[list[str]]:
    """The single commands of a script, as words."""
    commands: list[list[str]] = [[]]
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in lexer:
            if set(word) <= set("&|;"):
                commands.append([])
            else:
                commands[-1].append(word)
        commands.append([])
    return [words for words in commands if words]


@dataclass(frozen=True)
class Call:
    """A command of ours as a document shows it."""

    module: str
    words: tuple[str, ...]
    processes: int


SCRIPTS = ("launch/torchrun.sh", "launch/slurm/sfed.sbatch")


def call_of(words: list[str]) -> Call | None:
    """What of ours a command calls; None for commands of others."""
    count = {words[i]: int(words[i + 1]) for i in range(len(words) - 1) if words[i + 1].isdecimal()}
    processes = count.get("--nproc_per_node", count.get("--num_gpus", 1)) * count.get("--nnodes", 1)
    for position, word in enumerate(words):
        if word in ("-m", "--module") and words[position + 1].startswith(("sfed.", "tests.")):
            return Call(words[position + 1], tuple(words[position + 2 :]), processes)
        is_first = all("=" in before for before in words[:position])
        if word == "sfed" and is_first and words[position + 1 :]:
            return Call(f"sfed.{words[position + 1]}", tuple(words[position + 2 :]), processes)
        if word in SCRIPTS:
            return Call("sfed.train", tuple(words[position + 1 :]), processes)
        if word == "launch/sfed.json":  # Python is asked to run it
            return Call("sfed.train", tuple(words[position:]), processes)
    return None


def check_config(config: Config, processes: int) -> None:
    if not own_method.is_own(config.federated.method):  # test_own_method runs that of the page
        methods.resolve(config)
    num_clients = config.federated.num_clients or processes
    assert num_clients >= processes, "every process holds at least one client"


PARSERS = {
    "sfed.bench": bench._parser,
    "sfed.chat": chat._parser,
    "sfed.doctor": doctor._parser,
    "sfed.eval": evaluation._parser,
    "sfed.export": export._parser,
}


def check(call: Call) -> None:
    """Read what the command would read.

    Raises:
        UserError: as the command itself would.
    """
    words = list(itertools.takewhile(lambda word: word != "<", call.words))
    if call.module in ("sfed.train", "sfed.sweep"):
        rest = [word for word in logs.take_options(words) if word != "--dry-run"]
        found = config_load.split(rest)
        if found is None or found[0] in OF_A_READER:
            return
        path, overrides = found
        path = None if path is None else str(ROOT / path)
        if call.module == "sfed.sweep":
            assert path is not None
            grid.read(Path(path), overrides, call.processes, methods.resolve)
            return
        check_config(config_load.load(path, overrides), call.processes)
    elif call.module == "sfed.plan":
        given = plan._parser().parse_intermixed_args(words)
        path, *overrides = given.words
        check_config(config_load.load(str(ROOT / path), overrides), given.gpus)
    elif call.module in PARSERS:
        PARSERS[call.module]().parse_intermixed_args(words)
    elif call.module == "sfed.report":
        assert report._parser().parse_args(words).runs
    elif call.module in ("sfed.--help", "sfed.--version"):
        assert not words
    else:
        path = ROOT / call.module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


CALLS = [
    (page, script, call)
    for page in PAGES
    for script in [*fences(page, "bash"), *inline(page)]
    for words in split(script)
    if (call := call_of(words)) is not None
]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("SFED_LOG_LEVEL", "SFED_LOG_FORMAT"):  # options of commands go there
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    "call",
    [call for _, _, call in CALLS],
    ids=[f"{page.name}: {' '.join([call.module, *call.words])[:60]}" for page, _, call in CALLS],
)
def test_a_command_of_the_documents_is_valid(call: Call):
    check(call)


def test_commands_of_all_kinds_are_found():
    modules = {call.module for _, _, call in CALLS}
    assert {f"sfed.{name}" for name in ("train", "sweep", "report", "plan", "bench")} <= modules
    assert {"tests.support.soak", "tests.support.measure_wire"} <= modules
    assert len(CALLS) > 40


@pytest.mark.parametrize(
    "line",
    [
        "torchrun --nproc_per_node 4 -m sfed.train configs/gsm8k.yaml lora.rnak=8",
        "echo x && python -m sfed.train configs/gsm8k.yaml \\\n  lora.rank=-1  # a comment",
        "NNODES=2 launch/torchrun.sh configs/no-such-file.yaml",
        "deepspeed launch/sfed.json federated.method=none",
        "python -m sfed.sweep configs/ranks.yaml lora.rnak=8",
        "python -m sfed.plan configs/gsm8k.yaml --gpus 4 --gpu-memory 80",
        "python -m sfed.bench --modle stories",
        "sfed plan configs/gsm8k.yaml --gpus 4 --gpu-memory 80",
    ],
)
def test_a_wrong_command_would_be_found(line: str):
    calls = [call for words in split(line) if (call := call_of(words)) is not None]
    assert len(calls) == 1
    with pytest.raises(UserError):
        check(calls[0])


def test_more_processes_than_clients_would_be_found():
    (words,) = split("torchrun --nproc_per_node 8 -m sfed.train configs/gsm8k.yaml")
    call = call_of(words)
    assert call is not None
    with pytest.raises(AssertionError, match="at least one client"):
        check(call)


def test_the_grid_file_that_is_shown_is_valid(tmp_path: Path):
    (shown,) = fences(DOCS / "sweep-and-report.md", "yaml")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "methods.yaml").write_text(shown, encoding="utf-8")
    found = grid.read(tmp_path / "methods.yaml", (), 1, methods.resolve)
    assert len(found.cells) == 8


def test_the_configuration_of_a_classification_that_is_shown_is_valid(tmp_path: Path):
    (shown,) = fences(DOCS / "classification.md", "yaml")
    path = tmp_path / "diagnosis.yaml"
    path.write_text(shown, encoding="utf-8")
    assert config_load.load(str(path)).data.columns == {"text": "note", "label": "diagnosis"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_that_is_shown_can_be_parsed(page: Path):
    for shown in fences(page, "python"):
        ast.parse(shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_links_of_a_page_exist(page: Path):
    text = text_of(page)
    named = re.findall(r"(?<![\w./-])((?:tests|configs|launch)/[\w.-][\w./-]*)", text)
    missing = [path for path in named if not path.isupper() and not _exists(ROOT / path)]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing += [link for link in links if not _exists(page.parent / link)]
    assert missing == []


def _exists(path: Path) -> bool:
    return path.name.isupper() or path.exists() or path.with_suffix("").exists()


# --- the whole -----------------------------------------------------------------------------------


def test_the_readme_is_short_and_keeps_its_two_commands():
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 150
    for name in ("train", "tests"):
        blocks = re.findall(rf"^<!-- {name} -->\n```bash\n(.+)\n```\n<!-- end -->$", text, re.M)
        assert len(blocks) == 1
        assert blocks[0] in text_of(DOCS / "quickstart.md")
    privacy = text.partition("## ")[0]
    assert "one trust domain" in privacy


def test_every_page_is_listed_where_readers_look():
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    for name in ("README.md", "llms.txt"):
        assert set(re.findall(r"docs/([\w-]+)\.md", text_of(ROOT / name))) == pages
    toctrees = " ".join(re.findall(r"```{toctree}(.*?)```", text_of(DOCS / "index.md"), re.DOTALL))
    assert pages <= set(toctrees.split())


def test_every_configuration_has_its_line():
    text = text_of(ROOT / "configs" / "README.md")
    listed = re.findall(r"^\| `([\w./-]+\.yaml)`", text, re.MULTILINE)
    shipped = sorted(str(p.relative_to(ROOT / "configs")) for p in ROOT.glob("configs/**/*.yaml"))
    assert sorted(listed) == shipped


def test_the_reference_of_keys_is_the_schema(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    import configuration_keys

    assert "sphinx" not in sys.modules
    text = configuration_keys.keys_as_markdown()
    described = re.findall(r"^`([\w.]+)` — (.+); (.+)\n: (.+)$", text, re.MULTILINE)
    assert [key for key, *_ in described] == [key for key, *_ in config_load.list_keys()]
    types = {key: kind for key, kind, *_ in described}
    rank = "above 0 and at most 65536"
    assert types["lora.rank"] == f"integer {rank} or list of integers {rank}"
    assert types["federated.num_rounds"] == "integer above 0"
    assert types["clients.NAME.lr"] == "number above 0 or null"
    assert types["data.eval_fraction"] == "number above 0 and below 1"
    assert types["lora.target_modules"] == "string or list of strings"
    assert "`zero3`" in types["backbone.sharding"]
    assert text_of(DOCS / "configuration.md").count(configuration_keys.PLACE) == 1


def test_the_pages_load_nothing_from_elsewhere():
    picture = text_of(DOCS / "_static" / "round.svg")
    assert re.findall(r"(?:href|src|url\()=?[\"']?https?:", picture) == []
    style = text_of(DOCS / "_static" / "sfed.css")
    assert "http" not in style and "@import" not in style


def test_the_architecture_page_lists_every_file_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folder, listed = "", set()
    for line in text[text.index("## Files") :].splitlines():
        if heading := re.fullmatch(r"### `(\w+)/`", line):
            folder = heading[1]
        elif line.startswith("| `"):
            names = re.findall(r"`([\w/]+\.py)`", line.split(" | ")[0])
            listed |= {name if "/" in name or not folder else f"{folder}/{name}" for name in names}
    source = ROOT / "sfed"
    files = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    assert listed == {name for name in files if not name.endswith(("__init__.py", "__main__.py"))}


def test_the_architecture_page_lists_no_file_twice() -> None:
    text = text_of(DOCS / "architecture.md")
    for part in text[text.index("## Files") :].split("\n### "):
        named = re.findall(r"^\| (`[\w/]+\.py`.*?) \|", part, re.MULTILINE)
        files = [file for row in named for file in re.findall(r"`([\w/]+\.py)`", row)]
        assert len(files) == len(set(files)), part.splitlines()[0]


def test_the_layers_of_the_architecture_page_are_those_that_are_enforced() -> None:
    settings = text_of(ROOT / "pyproject.toml")
    listed = re.search(r"^layers = \[\n(.*?)^\]", settings, re.MULTILINE | re.DOTALL)
    assert listed is not None
    enforced = [
        set(re.findall(r"\w+", layer))
        for layer in re.findall(r'^ *"(.+?)",', listed[1], re.MULTILINE)
    ]
    text = text_of(DOCS / "architecture.md")
    shown = re.findall(r"^\| \d+ \| (.+) \|$", text, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in shown] == enforced


def test_the_templates_of_the_tasks_are_printed_as_they_are() -> None:
    page = DOCS / "own-data.md"
    blocks = [block.removesuffix("\n") for block in fences(page, "text")]
    table = [line for line in text_of(page).splitlines() if line.startswith("|")]
    long = (QUESTION, INSTRUCTION, INSTRUCTION_WITH_INPUT)
    assert {one.prompt.rstrip("\n") for one in long} <= set(blocks)
    for one in long:
        assert any(f"`{one.completion}`" in line and one.condition in line for line in table)
    for one in (PAIR, TEXT):
        assert any(f"`{one.completion}`" in line for line in table)

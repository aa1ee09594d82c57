"""README and docs: the page of flags is up to date, and every command in them is one that the scripts take."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

from core.config import ProCSTConfig
from data_handlers.datasets import DATA_SETS
from pages import OWN_DESCRIPTION, ROOT, commands_of
from training.flags import build_parser, options_of, parse, section_from
from uda.cbst_config import SelfTrainingConfig
from uda.config import SourceTrainingConfig

PAGES = [*(ROOT / name / "README.md" for name in ("", "data", "pretrained")), *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = {
    "train_procst": ProCSTConfig, "train_semseg_on_source": SourceTrainingConfig, "train_uda": SelfTrainingConfig,
}  # fmt: skip
ALL = [(page.relative_to(ROOT), command) for page in PAGES for command in commands_of(page.read_text())]


def test_the_page_of_flags_is_that_of_the_parsers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    assert (ROOT / "docs/flags.md").read_text() == importlib.import_module("write_flags").page()


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}-{command[:60]}" for page, command in ALL])
def test_a_command_of_the_docs_is_one_that_the_scripts_take(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("renders", "photos"):  # those that docs/own-data.md speaks of
        (tmp_path / folder).mkdir()
    (tmp_path / "frames.toml").write_text(OWN_DESCRIPTION)
    words = shlex.split(re.sub(r"\s#.*$", "", command))
    if words[0] == "srun":  # srun bash -c '... python SCRIPT ...'
        words = shlex.split(words[3])
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        assert set(named) <= set(targets)
        return
    start = next(k for k, word in enumerate(words) if word.endswith(".py"))
    script = ROOT / words[start]
    assert script.is_file()
    if script.parent != ROOT:
        return  # scripts of benchmarks and docs
    module = importlib.import_module(script.stem)
    if "--print_data" in words:
        assert words[words.index("--print_data") + 1] in DATA_SETS
        return
    arguments, config, groups = words[start + 1 :], CONFIGS.get(script.stem), module.GROUPS
    if script.stem == "train_uda":
        config, groups = module.flags_of(arguments)
    given = parse(build_parser("", groups), arguments)
    if config:
        config.check_given(given)
        if "continue_train_from_path" not in given:
            config.from_flags(given)
    else:
        for sections in module.GROUPS.values():
            for section in sections:
                section_from(section, given)


def test_there_are_commands_in_the_pages():
    assert len(ALL) > 15
    assert len(options_of(*(s for sections in ProCSTConfig.groups.values() for s in sections))) > 50


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 200
    assert len(text.split()) <= 1800

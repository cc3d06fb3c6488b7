"""The README tells the truth: its program is the one that is tested, its commands exist, its table of layers is the listing."""
import re
import shlex
from pathlib import Path

import pytest
from test_program import PROGRAM

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text(encoding='utf-8')


def statements(text: str) -> list[str]:
    "Lines of code, without comments"
    return [line.split(' #')[0].rstrip() for line in text.strip().splitlines()]


def test_the_program_is_the_tested_one():
    shown = statements(re.search(r'```python\n(.*?)```', README, re.S).group(1))
    assert shown == statements(PROGRAM)[:-1]


def test_the_commands_exist():
    targets = re.findall(r'^(\w+):', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M)
    assert set(re.findall(r'^    make (\w+)', README, re.M)) <= set(targets)
    assert 'make test' in (ROOT/'.ci'/'run').read_text(encoding='utf-8')


def commands_shown() -> list[str]:
    "What the README types behind `lamella`"
    return re.findall(r'^    lamella (.+)', README, re.M) + re.findall(r'`lamella ([^`]+)`', README)


@pytest.mark.parametrize('command', commands_shown())
def test_the_command_line_knows_what_is_shown(command):
    "Words and options are parsed before --help is followed"
    from click.testing import CliRunner
    from lamella.cli.commands import lamella
    found = CliRunner().invoke(lamella, [*shlex.split(command), '--help'])
    assert found.exit_code == 0, found.output


def test_the_command_line_is_shown(): assert len(commands_shown()) > 4


def test_the_layers_are_there():
    table = README.split('## The layers')[1].split('##')[0]
    for name in re.findall(r'`(\w+)/?`', ''.join(line.split('|')[2] for line in table.splitlines() if line.startswith('| ') and line[2].isdigit())):
        assert (ROOT/'lib'/'lamella'/name).is_dir() or (ROOT/'lib'/'lamella'/f'{name}.py').is_file(), name


def test_links_lead_somewhere():
    for target in re.findall(r'\]\(([^)#]+)\)', README):
        if not target.startswith('http'): assert (ROOT/target).exists(), target


def test_no_upper_caps():
    "Lower bounds only, in settings.ini"
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8')
    assert not re.search(r'[<]=?\s*\d|==', settings)

"""The shape of the code: short files and functions, little nesting, imports that point one way."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ['.', 'runtime', 'analysis', 'data', 'docs', 'assets', 'config']
FILES = sorted(path for folder in FOLDERS
               for path in (ROOT / folder).glob('*.py' if folder == '.' else '**/*.py'))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar,
         ast.Match)


def offenders(nodes_of):
    """'file:line' of every node that nodes_of(tree) finds in the project, each once."""
    return sorted({f'{name}:{node.lineno}' for name, tree in TREES.items()
                   for node in nodes_of(tree)})


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]


def too_deep(node, depth=0):
    """The blocks under node that stand in four others or more. An elif is on the level of its if.
    A function in a function goes on counting."""
    found = []
    for child in ast.iter_child_nodes(node):
        both_are_ifs = isinstance(node, ast.If) and isinstance(child, ast.If)
        is_elif = both_are_ifs and child.col_offset == node.col_offset
        is_new_level = isinstance(child, BLOCK) and not is_elif
        if is_new_level and depth >= 4:
            found.append(child)
        found += too_deep(child, depth + is_new_level)
    return found


def imported(node, inside_functions=True):
    """(line, first name of the module) for each import under node. A relative one's is '.'."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name.split('.')[0]) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.lineno, '.' if child.level else child.module.split('.')[0]
        elif inside_functions or not isinstance(child, FUNCTION):
            yield from imported(child, inside_functions)


def test_the_files_are_found():
    assert {'model.py', 'train.py', 'runtime/dataset.py', 'analysis/__main__.py',
            'data/openwebtext/prepare.py'} <= TREES.keys()


@pytest.mark.parametrize('name, most', [('train.py', 280), ('model.py', 390)])
def test_the_two_files_to_read_first_stay_short(name, most):
    n_lines = len((ROOT / name).read_text().splitlines())
    assert n_lines <= most, f'{name} has {n_lines} lines, at most {most} are allowed'


def test_no_function_is_longer_than_110_lines():
    found = offenders(lambda tree: [f for f in functions(tree) if f.end_lineno - f.lineno >= 110])
    assert not found, found


def test_no_statement_is_nested_deeper_than_four_levels():
    found = offenders(lambda tree: [node for f in functions(tree) for node in too_deep(f)])
    assert not found, found


def test_no_function_assigns_to_its_surroundings():
    found = offenders(lambda tree: [n for n in ast.walk(tree) if isinstance(n, ast.Nonlocal)])
    assert not found, found


def test_an_installation_has_every_module():

    setup = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    assert sorted(setup['py-modules']) == sorted(path.stem for path in ROOT.glob('*.py'))
    packages = {str(path.parent.relative_to(ROOT)).replace('/', '.')
                for folder in ('analysis', 'runtime') for path in ROOT.glob(f'{folder}/**/*.py')}
    assert sorted(setup['packages']) == sorted(packages)


def test_model_stands_alone():
    """model.py can be copied into another project: when imported, it needs nothing of this one."""
    ours = {Path(name).parts[0].removesuffix('.py') for name in TREES} | {'.', 'tests'}
    found = [f'model.py:{line} imports {module}'
             for line, module in imported(TREES['model.py'], inside_functions=False)
             if module in ours]
    assert not found, found


def test_only_data_knows_how_data_is_prepared():
    others = [name for name in TREES if '/' not in name or name.startswith('runtime/')]
    found = [f'{name}:{line}' for name in others
             for line, module in imported(TREES[name]) if module == 'data']
    assert not found, found

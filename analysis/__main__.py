"""List the analyses, a line each: python -m analysis"""

import ast
import sys
from pathlib import Path

from configurator import UserError, run

from analysis import NAMES

USAGE = '''usage: python -m analysis.NAME MODEL [--key=value ...]     --help explains its keys
example: python -m analysis.copying out/ckpt.pt
'''


def first_line(name):
    """The first line of an analysis's docstring. Reading the file is faster than importing it."""
    source = Path(__file__).with_name(f'{name}.py').read_text(encoding='utf-8')
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def main():
    arguments = sys.argv[1:]
    if arguments and not {'--help', '-h'} & set(arguments):
        raise UserError(f"{' '.join(arguments)} is not understood: python -m analysis lists the "
                        'analyses, python -m analysis.NAME runs one')
    print(USAGE)
    for name in NAMES:
        print(f'  {name:<20}{first_line(name)}')


if __name__ == '__main__':
    run(main)

"""List the analyses, a line each: python -m analysis"""

import sys
from importlib import import_module

from analysis import NAMES
from configurator import UserError, run


def main():
    if sys.argv[1:]:
        raise UserError(f"{' '.join(sys.argv[1:])} is not understood: python -m analysis lists the analyses, python -m analysis.NAME "
                        'runs one')
    print('python -m analysis.NAME --model=SOURCE      (--help lists the keys of each)\n')
    for name in NAMES:
        print(f'  {name:<20}{import_module(f"analysis.{name}").__doc__.strip().splitlines()[0]}')


if __name__ == '__main__':
    run(main)

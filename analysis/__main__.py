"""List the analyses, a line each: python -m analysis"""

from importlib import import_module

from analysis import NAMES


def main():
    print('python -m analysis.NAME --model=SOURCE      (--help lists the keys of each)\n')
    for name in NAMES:
        print(f'  {name:<20}{import_module(f"analysis.{name}").__doc__.strip().splitlines()[0]}')


if __name__ == '__main__':
    main()

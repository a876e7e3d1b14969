"""
Modules that take long to import, replaced by empty ones while a program prints its --help: that
needs the classes of its settings and computes nothing.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SLOW = ('torch', 'numpy', 'matplotlib', 'scipy', 'sklearn', 'tqdm', 'transformers')


def any_attribute(owner, name):
    if name.startswith('__'):
        raise AttributeError(name)
    return Anything


class OfAnything(type):
    __getattr__ = any_attribute

    def __call__(cls, *args, **kwargs):
        # as a decorator it leaves what it decorates
        return args[0] if len(args) == 1 and callable(args[0]) else super().__call__()


class Anything(metaclass=OfAnything):
    """Stands for whatever a module has: a base class, a decorator, a type, a function."""
    __getattr__ = any_attribute

    def __call__(self, decorated=None, *args, **kwargs):
        return decorated


class EmptyModule(ModuleType):
    __path__ = ()
    __getattr__ = any_attribute


class StandIn(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition('.')[0] in SLOW else None

    def create_module(self, spec):
        return EmptyModule(spec.name)

    def exec_module(self, module):
        pass


def use_stand_ins():
    """Have every later import of what is in SLOW give an empty module."""
    sys.meta_path.insert(0, StandIn())

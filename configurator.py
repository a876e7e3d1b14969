"""
Settings from Python config files and --key=value, later ones winning:

    python train.py config/train_shakespeare_char.py --batch_size=32 --device=cpu

A config file is Python that assigns keys. Names that begin with _ or are bound to modules, functions or classes are
not keys. A switch such as --stream may go without its =True. The known keys, their types, defaults and comments are
those of dataclasses; --help prints them.
"""

import builtins
import difflib
import errno
import inspect
import math
import os
import re
import sys
import time
import types
import typing
from ast import literal_eval
from dataclasses import fields
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's. The message is one line that names the key, the value and the remedy."""


def run(main):
    """Call main(). A UserError ends the program with its one line and exit code 2; errors of the project's own
    give a traceback."""
    try:
        main()
    except UserError as e:
        if os.environ.get('LOCAL_RANK', '0') != '0':
            time.sleep(3)  # torchrun ends this process meanwhile if the first one failed too: one line for all
        print('error:', ' '.join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not re.search("can't allocate memory|out of memory|Storage size calculation overflowed",
                                                            str(e)):
            raise
        print(f'error: there is not enough memory ({" ".join(str(e).split())[:150]}): make the model, batch_size or block_size '
              'smaller', file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader, for instance head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR):
            raise
        print(f'error: {e.filename or "a file or the output"} cannot be read or written ({e.strerror}): mend that and start again', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def build(cls, settings):
    """cls(**settings), with the ValueError of a check in __post_init__ as a UserError."""
    try:
        return cls(**settings)
    except ValueError as e:
        raise UserError(e) from None


def check_least(config, **at_least):
    """Raise ValueError for a key of config whose value is below the least that at_least has for it."""
    for key, least in at_least.items():
        if getattr(config, key) < least:
            raise ValueError(f'{key}={getattr(config, key)} must be at least {least}')


def configure(argv, config_class, model_config_class=None, **defaults):
    """Read a command line (without the program's name) into a config_class and, beside it, a dictionary of those keys
    of model_config_class that were given: a trainer that resumes must know what was asked for and what is a default.

    defaults take the place of the dataclasses' own. Raises UserError; --help prints the keys and exits.
    """
    classes = [config_class] + ([model_config_class] if model_config_class else [])
    hints = {key: hint for cls in classes for key, hint in typing.get_type_hints(cls).items()}
    standing = {f.name: f.default for cls in classes for f in fields(cls)} | defaults
    given = {}
    if '--help' in argv or '-h' in argv:
        print_help(classes, hints, standing)
        sys.exit(0)
    for arg in argv:
        if arg.startswith('-'):
            settings, prefix = read_option(arg, hints), '--'
        else:
            settings, prefix = run_config_file(arg, standing | given), f'{arg}: '
        given |= {key: checked(key, value, hints, prefix + key) for key, value in settings.items()}

    def pick(settings, cls):
        return {f.name: settings[f.name] for f in fields(cls) if f.name in settings}
    config = build(config_class, pick(defaults | given, config_class))
    return config, pick(given, model_config_class) if model_config_class else {}


def read_option(arg, hints):
    """'--key=value' -> {key: value}; the value of a key that is not text is read as a Python literal. A switch may go
    without: --key is --key=True."""
    key, equals, value = arg.removeprefix('--').partition('=')
    if arg.startswith('--') and not equals and hints.get(key) is bool:
        return {key: True}
    if not arg.startswith('--') or not equals:
        raise UserError(f"{arg!r} is not understood: options are written --key=value, for instance "
                        f"--{key.lstrip('-') if key.lstrip('-') in hints else 'max_iters'}=...; --help lists the keys")
    if hints.get(key) is not str:
        try:
            value = literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # stays text, which the check of its type will judge
    return {key: value}


def run_config_file(path, standing):
    """The keys that the Python file at path assigns. It may read the values that stand so far."""
    if not os.path.isfile(path):
        hint = f'; did you mean --{path}?' if '=' in path else ': give the path of a Python file, or --key=value'
        raise UserError(f'there is no config file {path!r}{hint}')
    if not path.endswith('.py'):
        raise UserError(f'{path!r} is no config file, whose name ends in .py: options are written --key=value, for instance '
                        '--model=... or --out_dir=...')
    # what stands so far lies where builtins lie, so that what the file assigns can be told from what it reads
    namespace = {'__builtins__': vars(builtins) | standing, '__file__': path}
    try:
        exec(compile(Path(path).read_bytes(), path, 'exec'), namespace)
    except (Exception, SystemExit) as e:
        lines = [f.lineno for f in inspect.getinnerframes(e.__traceback__) if f.filename == path]
        line = lines[-1] if lines else getattr(e, 'lineno', None)
        raise UserError(f"config file {path} raised {type(e).__name__}{f' in line {line}' if line else ''}: {e}") from None
    not_keys = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType)
    return {k: v for k, v in namespace.items() if k in standing or not k.startswith('_') and not isinstance(v, not_keys)}


def checked(key, value, hints, where):
    """value, if it suits the type that hints has for key; an int becomes a float where one is wanted."""
    if key not in hints:
        near = difflib.get_close_matches(key, hints, n=1, cutoff=0.4)
        other = '' if where.startswith('--') else ', or is the file for another program'
        raise UserError(f'unknown key {where}' + (f'; did you mean {near[0]}{other}?' if near else f'; --help lists the keys{other}'))
    hint = hints[key]
    if type(value).__module__ == 'numpy' and hasattr(value, 'item'):
        value = value.item()  # a config file may compute with numpy
    if typing.get_origin(hint) is typing.Literal:
        if any(type(value) is type(option) and value == option for option in typing.get_args(hint)):
            return value
        raise UserError(f'{where}={value!r} must be {describe_type(hint)}')
    allowed = typing.get_args(hint) or (hint,)
    if float in allowed and type(value) is int and abs(value) < 2 ** 63:
        value = float(value)
    if type(value) not in allowed:
        raise UserError(f'{where}={value!r} must be {describe_type(hint)}')
    if type(value) is str and '\0' in value:
        raise UserError(f'{where}={value!r} must be text without null characters')
    if type(value) is float and not math.isfinite(value) or type(value) is int and abs(value) >= 2 ** 63:
        raise UserError(f'{where}={value!r} must be finite and below 2**63')
    return value


def describe_type(hint):
    names = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text', type(None): 'None'}
    if typing.get_origin(hint) is typing.Literal:
        *most, last = [str(option) for option in typing.get_args(hint)]
    else:
        *most, last = [names[t] for t in typing.get_args(hint) or (hint,)]
    return f"{', '.join(most)} or {last}" if most else last


def print_help(classes, hints, standing):
    spec = sys.modules['__main__'].__spec__  # of a module that was started with python -m
    program = f'-m {spec.name}' if spec else os.path.basename(sys.argv[0])
    print(f'usage: python {program} [CONFIG.py ...] [--key=value ...]     later ones win\n')
    comments = {}
    for cls in classes:
        for base in reversed(cls.__mro__[:-1]):
            comments |= dict(re.findall(r'^    (\w+):.*?  # (.*)$', inspect.getsource(base), re.M))
    for key in hints:
        print(f'  --{key}={standing[key]!r}'.ljust(46), comments.get(key, ''))

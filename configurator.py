"""
Settings from Python config files and --key=value, later ones winning:

    python train.py config/train_shakespeare_char.py --batch_size=32 --device=cpu

A config file is Python that assigns keys. Names that begin with _ or are bound to modules,
functions or classes are not keys. A switch such as --stream may go without its =True. The fields
of dataclasses are the known keys. Their types, defaults and comments are those of the keys, and
--help prints them. A comment that is too long goes on in a line of its own, indented further than
the field.

~/ at the beginning of a config file's path or of a value is the home folder, except in a text that
the model reads (TEXT_KEYS). A config file that does not exist from the working directory is looked
for in the project's folder.

Every program imports this module before any package. It says how to go on where torch is missing.
"""

import builtins
import difflib
import errno
import importlib.util
import inspect
import math
import os
import re
import sys
import textwrap
import time
import traceback
import types
import typing
from ast import literal_eval
from dataclasses import fields
from pathlib import Path


def exit_with(message):
    """End the program with one line on stderr and exit code 2."""
    print('error:', ' '.join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def check_installed():
    """Say how to go on, and end the program, where its packages are missing."""
    # data can be prepared without torch
    package = 'numpy' if Path(sys.argv[0]).name == 'prepare.py' else 'torch'
    if importlib.util.find_spec(package):
        return
    installed = any(Path(__file__).parent.glob(f'.venv/lib/python*/site-packages/{package}'))
    make = '' if installed else 'make quick, which installs it in .venv, then '
    exit_with(f'{package} is not installed here: run {make}source .venv/bin/activate')


check_installed()
if {'--help', '-h'} & set(sys.argv[1:]):  # which does not wait for torch
    from runtime.stand_in import use_stand_ins
    use_stand_ins()

# torch's allocators raise RuntimeErrors. Only the message tells them from a mistake of ours.
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", 'out of memory')
TOO_LARGE_MESSAGE = 'Storage size calculation overflowed'  # a tensor past any memory
TEXT_KEYS = ('start', 'stop', 'prompt', 'prompts')  # in their values ~ is a character
# what a user can mend
FILE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EISDIR,
               errno.ENOTDIR)


class UserError(Exception):
    """A mistake of the user's. Its message is one line with the key, the value and the remedy."""


def run(main):
    """Call main(). A UserError ends the program with its one line and exit code 2. An error of the
    project's own gives a traceback. A character that the encoding of the output lacks is printed
    as its number, \\xe9, since the name of a folder must not end a program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    try:
        main()
    except UserError as e:
        if os.environ.get('LOCAL_RANK', '0') != '0':
            # If the first process failed too, torchrun ends this one meanwhile: one line for all.
            time.sleep(3)
        exit_with(e)
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e) and TOO_LARGE_MESSAGE not in str(e):
            raise
        reason = ' '.join(str(e).split())[:150]
        exit_with(f'there is not enough memory ({reason}): make the model, batch_size or '
                  'block_size smaller')
    except BrokenPipeError:  # the reader, for instance head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno not in FILE_ERRORS:
            raise
        exit_with(f'{e.filename or "a file or the output"} cannot be read or written '
                  f'({e.strerror}): mend that and start again')
    except KeyboardInterrupt:
        sys.exit(130)


def is_out_of_memory(error):
    """Whether an exception says that the memory of the CPU or the GPU is used up."""
    says_so = any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and says_so


def build(cls, settings):
    """cls(**settings). A ValueError of its __post_init__ becomes a UserError."""
    try:
        return cls(**settings)
    except ValueError as e:
        raise UserError(e) from None


def check_least(config, **at_least):
    """Raise ValueError for a key of config whose value is below the one that at_least has."""
    for key, least in at_least.items():
        if getattr(config, key) < least:
            raise ValueError(f'{key}={getattr(config, key)} must be at least {least}')


def configure(argv, config_class, model_config_class=None, positional=(), elsewhere=None,
              **defaults):
    """Read a command line (without the program's name). Returns a config_class, and a dictionary
    of the keys of model_config_class that were given: a trainer that resumes must tell what was
    asked for from what is a default.

    positional  keys whose values may be given without --key=, in this order
    elsewhere   {key: program} and {(key, value): program}, for the message about what only another
                program has
    defaults    take the place of the dataclasses' own

    Raises UserError. --help prints the program's docstring and its keys, and exits.
    """
    classes = [config_class] + ([model_config_class] if model_config_class else [])
    hints = {key: hint for cls in classes for key, hint in typing.get_type_hints(cls).items()}
    standing = {f.name: f.default for cls in classes for f in fields(cls)} | defaults
    if '--help' in argv or '-h' in argv:
        print_help(classes, standing, positional)
        sys.exit(0)

    given, places = {}, iter(positional)
    for arg in argv:
        if arg.startswith('-'):
            settings, prefix = read_option(arg, hints), '--'
        elif is_value(arg, hints) and (key := next(places, None)):
            settings, prefix = {key: read_value(arg, hints[key])}, '--'
        else:
            settings, prefix = run_config_file(find_file(arg), standing | given), f'{arg}: '
        for key, value in settings.items():
            if key not in hints:
                raise unknown_key(key, hints, prefix, elsewhere or {})
            if type(value) is str and (key, value) in (elsewhere or {}):
                raise UserError(f'{prefix}{key}={value!r} is for {elsewhere[key, value]}')
            value = checked(value, hints[key], prefix + key)
            given[key] = value if key in TEXT_KEYS else from_home(value)

    def pick(settings, cls):
        return {f.name: settings[f.name] for f in fields(cls) if f.name in settings}
    config = build(config_class, pick(defaults | given, config_class))
    return config, pick(given, model_config_class) if model_config_class else {}


def is_value(arg, hints):
    """Whether an argument that does not begin with - can be the value of a positional key, rather
    than a config file or an option whose -- was forgotten."""
    key, equals, _ = arg.partition('=')
    forgotten = equals and key in hints and not os.path.exists(arg)
    return arg != '' and not arg.endswith('.py') and not forgotten


def read_option(arg, hints):
    """'--key=value' -> {key: value}. A switch may go without its value: --key is --key=True."""
    key, equals, text = arg.removeprefix('--').partition('=')
    if arg.startswith('--') and not equals and hints.get(key) is bool:
        return {key: True}
    if not arg.startswith('--') or not equals:
        example = key.lstrip('-') if key.lstrip('-') in hints else 'max_iters'
        raise UserError(f'{arg!r} is not understood: options are written --key=value, for '
                        f'instance --{example}=...; --help lists the keys')
    return {key: read_value(text, hints.get(key))}


def read_value(text, hint):
    """The value that text stands for: itself where the type is str, else a Python literal."""
    if hint is str:
        return text
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # the check of its type will judge it


def from_home(value):
    """value, and where it is a text that is ~ or begins with ~/, with the home folder for ~."""
    is_at_home = isinstance(value, str) and (value + '/').startswith('~/')
    return os.path.expanduser(value) if is_at_home else value


def find_file(arg):
    """The path of the config file arg. The working directory wins over the project's folder."""
    path = from_home(arg)
    ours = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    is_ours = path.endswith('.py') and not os.path.isfile(path) and os.path.isfile(ours)
    return ours if is_ours else path


def run_config_file(path, standing):
    """The keys that the Python file at path assigns. It may read the values that stand so far."""
    if not os.path.isfile(path):
        hint = ': give the path of a Python file, or --key=value'
        if '=' in path:
            hint = f'; did you mean --{path}?'
        raise UserError(f'there is no config file {path!r}{hint}')
    if not path.endswith('.py'):
        raise UserError(f'{path!r} is no config file, whose name ends in .py: options are written '
                        '--key=value, for instance --model=... or --out_dir=...')
    # The standing values lie where builtins lie. So what the file assigns can be told from them.
    namespace = {'__builtins__': vars(builtins) | standing, '__file__': path}
    try:
        exec(compile(Path(path).read_bytes(), path, 'exec'), namespace)
    except (Exception, SystemExit) as e:
        steps = traceback.walk_tb(e.__traceback__)
        lines = [line for frame, line in steps if frame.f_code.co_filename == path]
        line = lines[-1] if lines else getattr(e, 'lineno', None)
        where = f' in line {line}' if line else ''
        raise UserError(f'config file {path} raised {type(e).__name__}{where}: {e}') from None
    return {key: value for key, value in namespace.items()
            if key in standing or may_be_key(key, value)}


def may_be_key(name, value):
    """Whether what a config file assigns to an unknown name is meant as a key."""
    not_keys = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType)
    return not name.startswith('_') and not isinstance(value, not_keys)


def unknown_key(key, hints, prefix, elsewhere):
    """The UserError for a key that the program does not have."""
    if key in elsewhere:
        return UserError(f'unknown key {prefix}{key}: it is a key of {elsewhere[key]}')
    near = nearest_key(key, hints)
    other = '' if prefix == '--' else ', or is the file for another program'
    remedy = f'; did you mean {near}{other}?' if near else f'; --help lists the keys{other}'
    return UserError(f'unknown key {prefix}{key}{remedy}')


def nearest_key(key, hints):
    """The one of hints that key is the beginning of, where it is the only one, or else that key is
    spelt much like; None if there is none. _, - and capitals do not count."""
    def plain(name):
        return name.replace('_', '').replace('-', '').lower()
    names = {plain(name): name for name in hints}
    longer = [name for name in names if len(plain(key)) > 2 and name.startswith(plain(key))]
    # At 0.8 a swap of two letters in a key of five is near, and momentum is near none of our keys.
    near = longer if len(longer) == 1 else difflib.get_close_matches(plain(key), names, 1, 0.8)
    return names[near[0]] if near else None


def checked(value, hint, where):
    """value, if it suits the type hint. An int becomes a float where one is wanted. Raises
    UserError, which begins with where."""
    if type(value).__module__ == 'numpy' and hasattr(value, 'item'):
        value = value.item()  # a config file may compute with numpy
    if typing.get_origin(hint) is typing.Literal:
        options = typing.get_args(hint)
        if any(type(value) is type(option) and value == option for option in options):
            return value
        raise UserError(f'{where}={value!r} must be {describe_type(hint)}')
    allowed = typing.get_args(hint) or (hint,)
    if float in allowed and type(value) is int and abs(value) < 2 ** 63:
        value = float(value)
    if type(value) not in allowed:
        raise UserError(f'{where}={value!r} must be {describe_type(hint)}')
    if type(value) is str and '\0' in value:
        raise UserError(f'{where}={value!r} must be text without null characters')
    if type(value) is tuple:
        return tuple(checked(item, int, where) for item in value)
    too_large = type(value) is int and abs(value) >= 2 ** 63
    if too_large or type(value) is float and not math.isfinite(value):
        raise UserError(f'{where}={value!r} must be finite and below 2**63')
    return value


def describe_type(hint):
    """A type hint in words, such as 'a whole number or None'."""
    names = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text',
             tuple: 'whole numbers with commas', type(None): 'None'}
    if typing.get_origin(hint) is typing.Literal:
        *most, last = [str(option) for option in typing.get_args(hint)]
    else:
        *most, last = [names[t] for t in typing.get_args(hint) or (hint,)]
    return f"{', '.join(most)} or {last}" if most else last


def print_help(classes, standing, positional):
    """Print the program's docstring, its usage, and each key with its default and comment."""
    program = sys.modules['__main__']
    if program.__doc__:
        print(inspect.cleandoc(program.__doc__) + '\n')
    name = sys.argv[0]
    if program.__spec__:  # it was started with python -m
        name = f'-m {program.__spec__.name}'
    words = [name, *(f'[{key.upper()}]' for key in positional), '[CONFIG.py ...]']
    print(f'usage: python {" ".join(words)} [--key=value ...]     later ones win\n')
    comments = {key: text for cls in classes for key, text in field_comments(cls).items()}
    for key, default in standing.items():
        head = f'  --{key}={default!r}'.ljust(46) + ' '
        text = textwrap.fill(comments.get(key, ''), 100, initial_indent=head,
                             subsequent_indent=' ' * 47, break_long_words=False,
                             break_on_hyphens=False)
        print(text or head.rstrip())


def field_comments(cls):
    """{field: comment} of a dataclass and its bases, read from the source."""
    field = r'^    (\w+):.*?  # (.*(?:\n {5,}# .*)*)$'
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        for key, text in re.findall(field, inspect.getsource(base), re.M):
            comments[key] = ' '.join(re.split(r'\s*\n +# ', text))
    return comments

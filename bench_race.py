"""python bench.py race: two programs train to one loss, from the start of the process on."""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import UserError, check_least, configure

import torch

from evaluate import split_loss
from runtime.checkpoint import checkpoint_path
from runtime.dataset import open_data
from runtime.loading import load_model
from runtime.progress import progress_bar

SEED = 'manual_seed(1337'  # is written into nanoGPT's program
NANOGPT_TRAIN = f"""
import sys
seed, *sys.argv = sys.argv[1:]
text = open('train.py').read().replace('{SEED}', 'manual_seed(' + seed)
exec(compile(text, 'train.py', 'exec'), {{'__name__': '__main__'}})
"""
# what its README says for a CPU
NANOGPT_ARGUMENTS = [
    'config/train_shakespeare_char.py', '--device=cpu', '--compile=False', '--eval_iters=20',
    '--log_interval=1', '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4',
    '--n_embd=128', '--max_iters=2000', '--lr_decay_iters=2000', '--dropout=0.0']
ROOT = Path(__file__).resolve().parent
POLL = 0.1  # seconds between looks at a checkpoint


@dataclass
class RaceConfig:
    against: str = ''  # a nanoGPT checkout; '': ours alone
    config: str = 'config/train_shakespeare_char_muon.py'  # of ours
    target: float = 1.9  # nats per token over the whole val split
    seeds: str = '1337,1338,1339'  # of each program, with commas
    dataset: str = 'shakespeare_char'  # of both
    json: bool = False  # print JSON in place of the table

    def __post_init__(self):
        check_least(self, target=0)
        if not all(seed.isdecimal() for seed in self.seeds.split(',')):
            raise ValueError(f'seeds={self.seeds!r} must be whole numbers with commas between them')


def race(argv):
    """
    Measure a race to a val loss: seconds from the start of a program to a checkpoint that has it,
    over the whole val split. Ours runs with a config file for it, nanoGPT with the command of its
    README for a CPU. They run in turn with the same bins, once for each seed. Losses are taken
    after the race. A run that does not get there counts with its whole time.

        python bench.py race --against=../nanoGPT

    It needs the data: python data/shakespeare_char/prepare.py first.
    """
    config, _ = configure(argv, RaceConfig)
    theirs = Path(config.against, 'train.py')
    if config.against and not (theirs.is_file() and SEED in theirs.read_text()):
        raise UserError(f"against={config.against!r}: {theirs} is not nanoGPT's; give a checkout "
                        'of it')
    if not Path(config.config).is_file():
        raise UserError(f'config={config.config!r} is no file: give a config file of train.py')
    data, rows = open_data(config.dataset), []
    names = ['ours', 'nanoGPT'] if config.against else ['ours']
    runs = [(seed, name) for seed in config.seeds.split(',') for name in names]
    for seed, name in (progress := progress_bar(runs)):
        progress.set_description(f'{name}, seed {seed}')
        with tempfile.TemporaryDirectory() as folder:
            checkpoints, seconds = watch(command_of(name, seed, data.folder, folder, config),
                                         config.against if name == 'nanoGPT' else ROOT, folder)
            rows.append({'seed': int(seed), 'program': name}
                        | first_below(checkpoints, seconds, data.val, config.target))
    times = {name: [row['seconds'] for row in rows if row['program'] == name] for name in names}
    ratios = [ours / other for ours, other in zip(*times.values())] if config.against else []
    if config.json:
        print(json.dumps({'rows': rows, 'ratios': ratios, 'settings': asdict(config)}, indent=2))
    else:
        print_race(rows, ratios, config.target)


def command_of(name, seed, data_folder, out_dir, config):
    where = [f'--out_dir={out_dir}', f'--dataset={Path(data_folder).resolve()}']
    if name == 'ours':
        return [ROOT / 'train.py', Path(config.config).resolve(), f'--seed={seed}',
                '--device=cpu', *where]
    return ['-c', NANOGPT_TRAIN, seed, 'train.py', *NANOGPT_ARGUMENTS, *where]


def watch(command, cwd, out_dir):
    """Run a program. Returns its checkpoints as pairs of seconds since it began and the path of a
    copy, and the seconds until it ended. Raises UserError if it fails."""
    path, copies, seen = checkpoint_path(out_dir, 'gpt'), [], None
    with open(Path(out_dir, 'log.txt'), 'w+') as log:
        began = time.time()
        process = subprocess.Popen([sys.executable, *command], cwd=cwd, stdout=log, stderr=log)
        running = True
        while running:
            running = process.poll() is None
            now = (path.stat().st_mtime, path.stat().st_size) if path.exists() else None
            is_complete = now == seen or not running
            if now and is_complete and (not copies or now[0] - began > copies[-1][0]):
                copies.append((now[0] - began, shutil.copy(path, f'{path}.{len(copies)}')))
            seen = now
            time.sleep(POLL if running else 0)
        seconds = time.time() - began
        if process.returncode:
            log.seek(0)
            raise UserError(f'{command[0]} failed: {log.read().strip().splitlines()[-1][:300]}')
    return copies, seconds


def first_below(checkpoints, seconds, tokens, target):
    """The seconds and the val loss of the first checkpoint at or below target; if there is none,
    those of the whole run and the last."""
    loss = float('inf')
    for at, path in checkpoints:
        loss = split_loss(load_model(path).model.eval(), tokens)
        if loss <= target:
            return {'seconds': at, 'val_loss': loss, 'reached': True}
    return {'seconds': seconds, 'val_loss': loss, 'reached': False}


def print_race(rows, ratios, target):
    print(f'val loss {target:g} over the whole val split; {torch.get_num_threads()} threads, '
          f'torch {torch.__version__}\n')
    print(f'{"seed":>6}  {"program":<10}{"seconds":>9}{"val loss":>10}')
    for row in rows:
        missed = '' if row['reached'] else '   not reached: its whole time'
        print(f'{row["seed"]:>6}  {row["program"]:<10}{row["seconds"]:>9.1f}'
              f'{row["val_loss"]:>10.4f}{missed}')
    if ratios:
        print(f'\nours takes {statistics.mean(ratios):.2f} of the time of nanoGPT, '
              f'{min(ratios):.2f} to {max(ratios):.2f}')

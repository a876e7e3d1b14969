"""
What MLA changes inside, on circuits that form in a minute: trains small models with each attention,
finds the circuit that copies in them, and says what differs, with intervals.

    python study.py --preset=minute        one pair of models, under two minutes on two cores
    python study.py --preset=evening       ten seeds of each attention, an hour
    python study.py --preset=night         everything
    python study.py --preset=night --question=least         the cells of one question

It needs nothing but this folder. Each model is a cell: an attention, a seed, and what else is not
as config/train_induction.py has it (study_grid.py). A cell is trained by the project's own loop,
one thread each, as many at once as there are cores. What it found is out_dir/cells/NAME.json, its
checkpoints are in out_dir/runs/NAME. A cell that is there is not trained again. One that was
stopped goes on where it was, so the same command carries on after a kill or adds seeds. At the end
report.html is written.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_least, configure, run

import torch

from analysis import development, induction_circuit, induction_in_text, latent_surgery
from analysis.program import as_json, writing_to
from analysis.record import final_stream, record
from analysis.subject import load_subject
from evaluate import text_scores
from models import cached_numbers
from runtime.checkpoint import checkpoint_path, read_checkpoint
from runtime.progress import progress_bar
from runtime.record import write_file
from runtime.run_folder import newest_metrics
from runtime.workers import default_workers, in_workers, worker_pool
from study_cells import MAIN
from study_controls import SeparateLatents
from study_grid import ATTENTIONS, PRESETS, QUESTIONS, VARIATIONS
from study_report import write_report
from study_text import READING
from train import TrainConfig, launch

HERE = Path(__file__).resolve().parent


@dataclass
class StudyConfig:
    preset: Literal['minute', 'evening', 'night'] = 'minute'  # how much is trained
    question: Literal['all', *QUESTIONS] = 'all'  # train the cells of one question of the page
    out_dir: str = 'out_study'  # where models, numbers and report.html go
    workers: int = 0  # models that are trained at once; 0: one for each core
    max_iters: int = 3000  # iterations of each; a circuit that forms later counts as not seen
    only_report: bool = False  # train nothing, and report what is there

    def __post_init__(self):
        check_least(self, workers=0, max_iters=1)
        if not self.out_dir:
            raise ValueError('out_dir is empty: give a folder')


def dataset_of(cell, out_dir):
    """The folder of the bins that a cell is trained on, and the command that writes them."""
    varied = VARIATIONS[cell.variation]
    if 'dataset' in varied:
        folder = HERE / 'data' / varied['dataset']
        return folder, (folder / 'prepare.py',)
    task, vocabulary = varied.get('task', 'stretch'), varied.get('vocabulary', 64)
    folder = Path(out_dir) / 'data' / f'{task}_{vocabulary}'
    return folder, (HERE / 'data/induction/prepare.py', f'--task={task}',
                    f'--vocabulary={vocabulary}', f'--out_dir={folder}')


def prepare(cells, out_dir):
    """Write the bins that are missing."""
    for folder, command in dict.fromkeys(dataset_of(cell, out_dir) for cell in cells):
        if not (folder / 'val.bin').exists():
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


def train_cell(cell, out_dir, max_iters):
    """Train a cell, in a process of its own, and take the model apart. Writes its JSON."""
    torch.set_num_threads(1)
    attention, folder = ATTENTIONS[cell.attention], Path(out_dir) / 'runs' / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    model_class = attention.model_class
    # a checkpoint is that of a GPT_MLA, with which the control cannot go on
    is_control = issubclass(model_class.attention_class, SeparateLatents)
    start = 'scratch' if is_control else 'auto'
    data, _ = dataset_of(cell, out_dir)
    arguments = [*cell.arguments(), f'--max_iters={max_iters}', f'--dataset={data}',
                 f'--out_dir={folder}', f'--init_from={start}', '--device=cpu', '--dtype=float32']
    path = checkpoint_path(folder, model_class.model_type)
    with open(folder / 'log.txt', 'a') as log, redirect_stdout(log), redirect_stderr(log):
        if not path.exists() or read_checkpoint(path, mmap=True)['iter_num'] < max_iters:
            config, model_args = configure(arguments, TrainConfig, model_class.config_class,
                                           bias=False)
            if launch(model_class, config, model_args).stopped:
                return
        found = take_apart(cell, load_subject(str(path), 'cpu'))
    found |= {'cell': asdict(cell), 'max_iters': max_iters, 'torch': torch.__version__}
    write_file(cell_file(cell, out_dir), (json.dumps(as_json(found)) + '\n').encode())


def take_apart(cell, subject):
    """What is kept of a trained cell, a dictionary."""
    model, bins = subject.model, subject.open_data('', key='dataset')
    scores = text_scores(model, bins.val, bins.tokenizer, torch.float32, 64, bins.sequence)
    found = {'val_loss': scores['loss'], 'bits_per_byte': scores['bits_per_byte'],
             'parameters': model.get_num_params(),
             'cached': cached_numbers(model) // model.config.n_layer,
             'circuit': induction_circuit.analyse(subject, induction_circuit.Config()),
             'development': development.analyse(subject, development.Config())}
    if bins.sequence:
        found['late_accuracy'] = late_accuracy(model, bins.val)
    if cell.variation == READING:
        settings = induction_in_text.Config(max_tokens=2 ** 17)
        found['in_text'] = induction_in_text.analyse(subject, settings)
    return found


def late_accuracy(model, tokens):
    """How often the next token is the likeliest one, past the place 16 of the first 500 sequences
    of 33 tokens. There the controls repeat what they have shown."""
    ids = torch.from_numpy(tokens[:500 * 33].astype('int64')).view(-1, 33)
    guesses = model.unembed(final_stream(record(model, ids[:, :-1]))).argmax(-1)
    return float((guesses == ids[:, 1:])[:, 16:].double().mean())


def operate_cell(cell, out_dir):
    """The surgery on a trained cell that copies, in a process of its own. Writes its JSON."""
    torch.set_num_threads(1)
    model_type = ATTENTIONS[cell.attention].model_class.model_type
    path = checkpoint_path(Path(out_dir) / 'runs' / cell.name, model_type)
    with open(path.parent / 'log.txt', 'a') as log, redirect_stderr(log):
        result = latent_surgery.analyse(load_subject(str(path), 'cpu'), latent_surgery.Config())
    found = {'cell': asdict(cell), 'surgery': result}
    write_file(cell_file(cell, out_dir, 'surgery'), (json.dumps(as_json(found)) + '\n').encode())


def cell_file(cell, out_dir, kind='cells'):
    return Path(out_dir) / kind / f'{cell.name}.json'


def to_operate(cells, out_dir):
    """Those of cells on which surgery is to be done: trained ones that copy."""
    def copies(cell):
        path = cell_file(cell, out_dir)
        return path.exists() and json.loads(path.read_text())['circuit'][
            'accuracy'] >= induction_circuit.COPIES
    return [cell for cell in cells if cell.attention in MAIN and not cell.variation
            and not cell_file(cell, out_dir, 'surgery').exists() and copies(cell)]


def is_done(cell, config):
    """Whether a cell has been trained for as many iterations as are wanted, or more."""
    path = cell_file(cell, config.out_dir)
    wanted = cell.iterations(config.max_iters)
    return path.exists() and json.loads(path.read_text())['max_iters'] >= wanted


def iterations_of(cell, out_dir):
    """How far a cell is trained, from its log of metrics."""
    model_type = ATTENTIONS[cell.attention].model_class.model_type
    return newest_metrics(Path(out_dir) / 'runs' / cell.name, model_type).get('iter', 0)


def train_cells(cells, config):
    """Train cells in parallel processes, with one bar of iterations."""
    os.environ['OMP_NUM_THREADS'] = '1'  # of the processes to come
    wanted = {cell: cell.iterations(config.max_iters) for cell in cells}
    bar = progress_bar(total=sum(wanted.values()), desc='iterations', unit_scale=True)
    with worker_pool(min(config.workers, len(cells))) as pool, bar:
        pending = {pool.submit(train_cell, cell, config.out_dir, n): cell
                   for cell, n in wanted.items()}
        try:
            done = 0
            while pending:
                ended, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                    done += wanted[pending[future]]
                    tell(pending.pop(future), config.out_dir)
                now = done + sum(iterations_of(cell, config.out_dir) for cell in pending.values())
                bar.update(max(0, now - bar.n))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def tell(cell, out_dir):
    """A line on what a cell has become."""
    path = cell_file(cell, out_dir)
    if not path.exists():
        return
    circuit = json.loads(path.read_text())['circuit']
    shift = f" {circuit['shift']}" if circuit['algorithm'] == 'shifted' else ''
    print(f"{cell.name:<24}{circuit['algorithm'] + shift:<14}copies {circuit['accuracy']:>6.1%}   "
          f"best head {circuit['score']:.2f}", flush=True)


def main():
    config, _ = configure(sys.argv[1:], StudyConfig)
    began, cells = time.time(), PRESETS[config.preset]
    if config.question != 'all':
        cells = [cell for cell in cells if cell in QUESTIONS[config.question]]
    if not cells:
        raise UserError(f'--preset={config.preset} has nothing for --question={config.question}: '
                        'take --preset=night')
    config.workers = config.workers or default_workers()
    with writing_to(config.out_dir):
        for kind in ('cells', 'surgery'):
            (Path(config.out_dir) / kind).mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not is_done(cell, config)]
    iterations = sum(cell.iterations(config.max_iters) for cell in missing)
    print(f'{len(cells)} cells, {len(missing)} to train, {iterations:,} iterations')
    if missing and not config.only_report:
        prepare(missing, config.out_dir)
        train_cells(missing, config)
    with_surgery = config.preset != 'minute' and config.question in ('all', 'circuits')
    operated = to_operate(cells, config.out_dir) if with_surgery else []
    if operated and not config.only_report:
        print(f'{len(operated)} to operate on')
        with worker_pool(min(config.workers, len(operated))) as pool:
            in_workers(pool, operate_cell, [((cell, config.out_dir), 1) for cell in operated],
                       desc='surgery')
    if not any(cell_file(cell, config.out_dir).exists() for cell in cells):
        raise UserError(f'out_dir={config.out_dir} has no cells to report: leave out --only_report')
    labels = {name: attention.label for name, attention in ATTENTIONS.items()}
    path = write_report(config.out_dir, labels, f'python study.py --preset={config.preset}')
    print(f'saved {path}, {(time.time() - began) / 60:.1f} minutes')


if __name__ == '__main__':
    run(main)

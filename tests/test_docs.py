"""README.md and docs/ are true: their commands run, their links lead somewhere, their keys are the
programs'."""

import gzip
import html
import importlib
import io
import json
import pickle
import re
import runpy
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import save_hugging_face, tiny_model
from matplotlib.figure import Figure
from test_tokenizer import learned

from analysis import NAMES
from analysis.program import AnalysisConfig
from bench import DecodeConfig, KAheadDecodeConfig, PrepareBenchConfig
from bench_race import RaceConfig
from bench_train import StepConfig
from convert_mla import ConvertConfig
from data import prepare, tiny_shakespeare
from data.prepare import PrepareConfig
from evaluate import EvaluateConfig
from export_huggingface import ExportConfig
from model import GPT
from model_k_ahead import KAheadConfig
from model_mla import GPT_MLA
from runs import RunsConfig
from runtime import dataset
from runtime.checkpoint import save_checkpoint
from runtime.dataset import write_splits
from runtime.tokenizer import make_tokenizer
from sample import SampleConfig
from train import TrainConfig
from visualize_residual_space_gpt2 import ResidualConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]

DATASETS = ('shakespeare_char', 'shakespeare', 'openwebtext')
NETWORK, GPUS, NANOGPT = 'needs the network', 'needs GPUs', 'needs a nanoGPT checkout'
TESTED = 'a test of its own: '
NOT_RUN = {  # commands that the test of a page does not run, and why
    'make quick': 'needs the network to install, and minutes; ' + TESTED + 'tests/test_quick.py',
    'make test': 'is what runs this',
    'make check': '.ci/run runs it',
    'make docs': TESTED + 'test_the_reference_is_current',
    'source .venv/bin/activate': 'is the environment of the tests',
    'pip install -r requirements.txt': NETWORK,
    'python -m pytest -q tests/test_model.py': 'is part of make test',
    'torchrun --standalone --nproc_per_node=8 train_mla.py config/train_gpt2_mla.py': GPUS,
    'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=2 --nproc_per_node=8 '
    '--rdzv_backend=c10d --rdzv_endpoint=node1:29500 --rdzv_id=gpt2-mla --max-restarts=3 '
    'train_mla.py config/train_gpt2_mla.py --gradient_accumulation_steps=48 --init_from=auto':
        GPUS + '; ' + TESTED + 'tests/test_two_nodes.py',
    'sbatch config/train_gpt2_mla.slurm': GPUS + '; ' + TESTED + 'tests/test_two_nodes.py',
    'python data/openwebtext/prepare.py': NETWORK,
    'python data/prepare.py --dataset=HuggingFaceFW/fineweb-edu --subset=sample-10BT '
    '--out_dir=data/fineweb --tokenizer=gpt2': NETWORK,
    'python study.py --preset=minute': 'takes minutes; ' + TESTED + 'tests/test_study.py',
    'python study.py --preset=evening': 'takes an hour; ' + TESTED + 'tests/test_study.py',
    'python study.py --preset=night': 'takes a night; ' + TESTED + 'tests/test_study.py',
    'python study.py --preset=night --question=least': 'takes hours; ' + TESTED +
        'tests/test_study.py',
    'python study_check.py out_study': 'needs a study; ' + TESTED + 'tests/test_study.py',
    'python -m analysis.development out_induction/ckpt.pt': 'needs a long run; ' + TESTED +
        'tests/test_circuits_that_copy.py',
    'python -m analysis.development out_induction/ckpt.pt --scores=induction_heads.scores,'
    'attention_patterns.previous,copying.top5.mean': 'needs a long run; ' + TESTED +
        'tests/test_circuits_that_copy.py',
    'python -m analysis.latent_surgery out_induction/ckpt.pt': 'needs a long run; ' + TESTED +
        'tests/test_circuits_that_copy.py',
    'python bench.py race --against=../nanoGPT': NANOGPT,
    'python bench.py train --models=mha,mla --rounds=8 --steps=12 --n_layer=4 --n_head=4 '
    '--n_embd=128 --block_size=64 --vocab_size=64 --batch_size=12 --against=../nanoGPT': NANOGPT,
    'python bench.py train --models=mha,mla --rounds=4 --steps=2 --n_layer=6 --n_head=6 '
    '--n_embd=384 --block_size=256 --vocab_size=64 --batch_size=12 --against=../nanoGPT': NANOGPT,
    'python bench.py train --models=mha,mla --rounds=2 --steps=2 --block_size=256 --batch_size=4 '
    '--against=../nanoGPT': NANOGPT,
    'python bench.py decode --compile --models=mha,mla --n_layer=4 --n_head=4 --n_embd=128 '
    '--vocab_size=64 --block_size=256 --contexts=1 --new_tokens=254':
        TESTED + 'tests/test_bench.py',
    'python bench.py train --steps=1': TESTED + 'tests/test_bench.py',
    'python bench.py prepare --against=../nanoGPT': NANOGPT,
    'python bench.py decode --contexts=1 --new_tokens=512 --against=../nanoGPT,transformers':
        NANOGPT,
}

# what is added to a command so that it takes a moment
SHAPE = '--n_layer=2 --n_head=2 --n_embd=16 --block_size=32'
TRAIN = ('--device=cpu --max_iters=2 --eval_iters=1 --batch_size=2 --gradient_accumulation_steps=1 '
         '--wandb_log=False')
SAMPLE = '--device=cpu --num_samples=1 --max_new_tokens=4'
SHORTER = {
    'train.py': TRAIN,
    'train_mla.py': TRAIN,
    'train_k_ahead.py': TRAIN,
    'test_shakespeare_quick.py': TRAIN,
    'sample.py': SAMPLE,
    'sample_mla.py': SAMPLE,
    'sample_k_ahead.py': SAMPLE,
    'bench.py decode': f'{SHAPE} --vocab_size=50 --contexts=4 --new_tokens=2 --rounds=1',
    'bench.py k-ahead': '--prompts=2 --new_tokens=4',
    'convert_mla.py': '--calibration_tokens=256',
    'data/prepare.py': '--workers=1',
    'data/induction/prepare.py': '--sequences=64 --out_dir=data/induction',
    'data/openwebtext/prepare.py': '--workers=1',
    'data/plays/prepare.py': '--workers=1 --vocab_size=300 --out_dir=data/plays',
    'analysis.induction_heads': '--sequences=2',
    'analysis.attention_patterns': '--sequences=2',
    'analysis.ioi': '--prompts=4 --patch_prompts=2',
}


def name_of(page):
    return str(page.relative_to(ROOT))


def commands(page):
    """The commands in the sh blocks of a page, without their comments."""
    found = []
    for language, block in re.findall(r'^```(.*?)\n(.*?)^```', page.read_text(), re.M | re.S):
        if language == 'python':
            continue
        lines = block.replace('\\\n', ' ').splitlines()
        found += [re.sub(r'\s+# .*$', '', line).strip() for line in lines]
    return list(filter(None, found))


def program_of(words):
    """The key of SHORTER for the words of a command."""
    if words[1] == '-m':
        return words[2]
    return ' '.join(words[1:3]) if words[1] == 'bench.py' else words[1]


def shorter(words):
    """Options that make the program of a command quick."""
    program = program_of(words)
    options = SHORTER.get(program, '').split()
    from_scratch = not any(re.search('init_from=|gpt2.py|finetune', word) for word in words)
    if program.startswith(('train', 'test_shakespeare')) and from_scratch:
        options += SHAPE.split()
    return options


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A folder like the project's after make quick, with a short text and models that have learned
    nothing. It also has what the pages say is downloaded."""
    root = tmp_path_factory.mktemp('prepared')
    (root / 'config').symlink_to(ROOT / 'config')
    text = tiny_shakespeare.from_package().decode()
    chars, pairs = make_tokenizer(sorted(set(text))), make_tokenizer('gpt2')
    for name, tokenizer in zip(DATASETS, (chars, pairs, pairs)):
        folder = root / 'data' / name
        folder.mkdir(parents=True)
        (folder / 'input.txt').write_text(text[:20_000])
        ids = tokenizer.encode(text[:12_000])
        write_splits(folder, ids[:-1_000], ids[-1_000:], tokenizer)
    (root / 'out_shakespeare_quick').mkdir()
    for model_class, name in ((GPT, 'ckpt.pt'), (GPT_MLA, 'ckpt_mla.pt')):
        model = tiny_model(model_class, vocab_size=chars.n_vocab, n_layer=4, n_head=4, n_embd=128,
                           block_size=64, bias=False)
        save_checkpoint(root / 'out_shakespeare_quick' / name, model, chars,
                        {'dataset': 'shakespeare_char'}, 0)
    gpt2 = tiny_model(GPT, vocab_size=50257, block_size=64, n_layer=12)
    save_hugging_face(gpt2, root / 'gpt2')
    (root / 'path' / 'to').mkdir(parents=True)
    for name in ('gpt2-xl', 'path/to/gpt2'):
        (root / name).symlink_to(root / 'gpt2')
    (root / 'prompt.txt').write_text('To be')
    (root / 'book.txt').write_text(text[:20_000])
    question = {'ctx': 'To be', 'endings': ['or not to be', 'a', 'b', 'c'], 'label': 0}
    (root / 'hellaswag_val.jsonl').write_text((json.dumps(question) + '\n') * 3)
    (root / 'corpus' / 'part').mkdir(parents=True)
    lines = ''.join(json.dumps({'text': text[i:i + 50]}) + '\n' for i in range(0, 2000, 50))
    (root / 'corpus' / 'part' / 'a.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    return root


@pytest.fixture
def world(prepared, tmp_path, monkeypatch):
    """Work in a copy of the prepared folder, and take its data/ for the project's."""
    shutil.copytree(prepared, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, 'DATA', tmp_path / 'data')
    for name in ('shakespeare_char', 'shakespeare'):
        program = importlib.import_module(f'data.{name}.prepare')
        monkeypatch.setattr(program, 'HERE', tmp_path / 'data' / name)
    monkeypatch.setattr(prepare, 'HERE', tmp_path / 'data')
    monkeypatch.setattr('runtime.workers.ProcessPoolExecutor',
                        lambda workers, *args: ThreadPoolExecutor(workers))
    monkeypatch.setattr('runtime.workers.default_workers', lambda: 1)  # threads share one stdout
    # drawing takes most of the time, and other tests look at the pictures
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **_: Path(path).write_bytes(b'PNG'))


def execute(command, monkeypatch):
    """Run a command of a page in this process, as python would. Returns its exit code."""
    if ' | ' in command:
        words, command = command.split(' | ')
        stdin = io.TextIOWrapper(io.BytesIO(shlex.split(words)[1].encode()))
        monkeypatch.setattr(sys, 'stdin', stdin)
    words = shlex.split(command)
    assert words[0] == 'python', f'neither run nor in NOT_RUN: {command}'
    arguments = words[3 if words[1] == '-m' else 2:] + shorter(words)
    monkeypatch.setattr(sys, 'argv', [words[1], *arguments])
    try:
        if words[1] == '-m':
            runpy.run_module(words[2], run_name='__main__', alter_sys=True)
        elif words[1].startswith('data/'):  # its folder is the world's
            module = importlib.import_module(words[1].removesuffix('.py').replace('/', '.'))
            module.main()
        else:
            runpy.run_path(str(ROOT / words[1]), run_name='__main__')
    except SystemExit as e:
        return e.code or 0
    return 0


@pytest.mark.filterwarnings('ignore:.*found in sys.modules.*:RuntimeWarning')
@pytest.mark.parametrize('page', [*filter(commands, PAGES)], ids=name_of)
def test_the_commands_of_a_page_run_one_after_the_other(page, world, monkeypatch, capsys):
    for command in commands(page):
        if command in NOT_RUN:
            continue
        code = execute(command, monkeypatch)
        assert code == 0, f'{command}\n{capsys.readouterr().err}'


def table_of_data():
    """The rows of docs/data.md's table: what there is, how it is prepared, how it is trained."""
    rows = (ROOT / 'docs' / 'data.md').read_text().split('|---|---|---|\n')[1].split('\n\n')[0]
    return [[cell.strip(' `') for cell in row.strip('|').split(' | ')] for row in rows.split('\n')]


def write_what_people_have(text):
    """The files that the table names, in the working directory."""
    rng = np.random.default_rng(0)
    for folder in ('notes', 'novels'):
        Path(folder).mkdir()
    for i in range(5):
        Path('notes', f'{i}.md').write_text(f'# Note {i}\n{text[i * 900:][:900]}\n')
        Path('novels', f'{i}.txt').write_text('\u6771\u4eac\u7684\u590f\u3002\n' * 90)
    lines = [{'text': text[i:i + 300] if i % 1500 else ''} for i in range(0, 15_000, 300)]
    Path('posts.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    Path('genome.txt').write_text(''.join(rng.choice(list('ACGT'), size=9000)))
    Path('tokenizer.json').write_text(learned().to_str())
    words = [f'word{i}' for i in range(100_000)]
    for name, ids, dtype in (
            ('words', rng.integers(100_000, size=900), np.uint32),
            ('nanogpt', make_tokenizer('gpt2').encode(text[:5000]), np.uint16),
            ('ids', rng.integers(1500, size=900), np.uint16)):
        Path('data', name).mkdir()
        for split in ('train', 'val'):
            np.array(ids, dtype=dtype).tofile(Path('data', name, f'{split}.bin'))
    Path('data', 'words', 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 100_000,
                                                                'itos': words}))


@pytest.mark.parametrize('row', table_of_data(), ids=lambda row: row[0])
def test_each_row_of_the_table_of_data(row, world, monkeypatch, capsys):
    """Its commands run, and a sample has what the user's text has."""
    write_what_people_have(Path('book.txt').read_text())
    _, prepare_command, options = row
    if prepare_command != 'nothing':
        assert execute(prepare_command, monkeypatch) == 0, capsys.readouterr().err
    train = f'python train.py config/train_shakespeare_char_cpu.py {options}'
    assert execute(train, monkeypatch) == 0, capsys.readouterr().err
    capsys.readouterr()
    out_dir = options.split('--out_dir=')[1]
    assert execute(f'python sample.py {out_dir} --json', monkeypatch) == 0
    said = capsys.readouterr()
    sample, = map(json.loads, said.out.splitlines())
    is_right = {'out_book': lambda text: set(text) <= set(Path('book.txt').read_text()),
                'out_novels': lambda text: set(text) <= set('\u6771\u4eac\u7684\u590f\u3002\n'),
                'out_dna': lambda text: set(text) <= set('ACGT') and 'no line break' in said.err,
                'out_words': lambda text: all(word.startswith('word') for word in text.split()),
                'out_ids': lambda text: [int(word) for word in text.split()] == sample['tokens']}
    assert len(sample['tokens']) == 4 and is_right.get(out_dir, len)(sample['text']), sample


def test_what_is_not_run_stands_somewhere():
    assert set(NOT_RUN) <= {command for page in PAGES for command in commands(page)}


def test_the_two_commands_come_first():
    blocks = (ROOT / 'README.md').read_text().split('```')
    assert 'make quick' in blocks[1] and 'make test' in blocks[1]
    assert blocks[3].startswith('sh\nsource .venv/bin/activate\n')


def test_what_readme_quotes_stands_in_the_report():
    """A rerun of the study that says otherwise must not leave a sentence here."""
    pages = [(ROOT / name).read_text() for name in ('README.md', 'docs/study.md')]
    quotes = [quote for page in pages for quote in re.findall(r'(?:^> .*\n)+', page, re.M)]
    report = html.unescape((ROOT / 'study' / 'report.html').read_text())
    said = [' '.join(quote.replace('> ', ' ').split()) for quote in quotes]
    assert said and [sentence for sentence in said if sentence not in report] == []


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 250


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_lines_are_short(page):
    """Prose, that is: tables, code and lines with links may be longer."""
    prose = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S).splitlines()
    long = [line for line in prose if len(line) > 100 and '](' not in line and line[0] != '|']
    assert long == []


@pytest.mark.parametrize('page', [*PAGES, ROOT / 'CHANGELOG.md'], ids=name_of)
def test_links_and_pictures_lead_somewhere(page):
    text = page.read_text()
    slugs = {re.sub(r'[^\w -]', '', title).strip().lower().replace(' ', '-')
             for title in re.findall(r'^#+ (.*)$', text, re.M)}
    for link in re.findall(r'\]\(([^)]+)\)', text):
        path, _, anchor = link.partition('#')
        if not link.startswith('http'):
            assert anchor in slugs if not path else (page.parent / path).exists(), link


def test_the_reference_is_current():
    reference = runpy.run_path(str(ROOT / 'docs' / 'make_reference.py'))['reference']()
    assert (ROOT / 'docs' / 'reference.md').read_text() == reference, 'run make docs'


@pytest.mark.parametrize('config_class', [
    TrainConfig, KAheadConfig, SampleConfig, EvaluateConfig, ConvertConfig, ExportConfig,
    DecodeConfig, StepConfig, KAheadDecodeConfig, PrepareBenchConfig, RaceConfig, PrepareConfig,
    ResidualConfig, RunsConfig, AnalysisConfig])
def test_every_key_is_explained_with_its_default(config_class):
    rows = [f'| `{f.name}` | `{f.default!r}` | ' for f in fields(config_class)]
    reference = (ROOT / 'docs' / 'reference.md').read_text()
    assert [row for row in rows if row not in reference] == []


@pytest.mark.parametrize('name', NAMES)
def test_every_key_of_an_analysis_is_explained(name):
    reference = (ROOT / 'docs' / 'reference.md').read_text()
    section = reference.split(f'## python -m analysis.{name}\n')[1].split('\n## ')[0]
    common = {f.name for f in fields(AnalysisConfig)}
    own = [f for f in fields(importlib.import_module(f'analysis.{name}').Config)
           if f.name not in common]
    assert [f.name for f in own if f'| `{f.name}` | `{f.default!r}` | ' not in section] == []


def test_every_document_is_linked_from_readme():
    readme = (ROOT / 'README.md').read_text()
    others = [name_of(page) for page in PAGES[1:]]
    assert [name for name in others if f']({name})' not in readme] == []

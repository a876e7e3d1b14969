"""docs/tour.ipynb runs from its first cell to its last. docs/notebook.md's table is complete."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_models import subject
from family import FAMILY, member

import analysis
from analysis import at
from model import GPT
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.dataset import write_splits
from runtime.tokenizer import make_tokenizer

ROOT = Path(__file__).parents[1]
RUN = '''
import sys
import matplotlib
matplotlib.use('Agg')
cells = sys.stdin.read().split('\\0')
names = {}
for cell in cells:
    lines = [line for line in cell.splitlines() if not line.startswith('%')]
    exec(compile('\\n'.join(lines), 'a cell', 'exec'), names)
    print('CELL DONE')
'''


def cells(kind):
    notebook = json.loads((ROOT / 'docs' / 'tour.ipynb').read_text())
    return [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == kind]


@pytest.fixture
def trained(tmp_path):
    """A folder with two random models where make quick puts its own, that read letters."""
    chars = sorted({*''.join(map(chr, range(32, 127))), '\n'})
    ids = np.random.default_rng(0).integers(len(chars), size=9000).tolist()
    for name in ('data', 'docs', 'out_shakespeare_quick'):
        (tmp_path / name).mkdir()
    write_splits(tmp_path / 'data', ids[:4000], ids[4000:], make_tokenizer(chars))
    for model_class, name in ((GPT, 'ckpt.pt'), (GPT_MLA, 'ckpt_mla.pt')):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(
            block_size=64, vocab_size=len(chars), n_layer=4, n_head=4, n_embd=32))
        save_checkpoint(tmp_path / 'out_shakespeare_quick' / name, model, make_tokenizer(chars),
                        {'dataset': str(tmp_path / 'data')}, 0)
    return tmp_path


def test_the_tour_runs(trained):
    source = cells('code')
    ran = subprocess.run([sys.executable, '-c', RUN], input='\0'.join(source), text=True,
                         capture_output=True, cwd=trained / 'docs', timeout=300,
                         env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count('CELL DONE') == len(source)
    for words in ('MLA, latent: 0: ', 'tokens that differ', 'e less a: ', 'they differ most'):
        assert words in ran.stdout


def test_the_tour_has_been_executed_and_its_links_lead_somewhere():
    notebook = json.loads((ROOT / 'docs' / 'tour.ipynb').read_text())
    code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell['outputs'] for cell in code)
    assert not any(output['output_type'] == 'error' for cell in code for output in cell['outputs'])
    for link in re.findall(r'\]\((.*?)\)', ''.join(cells('markdown'))):
        assert (ROOT / 'docs' / link).exists(), link


def test_the_table_of_names_is_complete():
    text = (ROOT / 'docs' / 'notebook.md').read_text()
    table = text[text.index('## Names'):text.index('## Edits')]
    named = set(re.findall(r'^\| `([\w.]+)`', table, re.MULTILINE))
    found = set()
    for name in FAMILY:
        s = subject(member(name))
        found |= {key.replace('blocks.0.', '') for key in s.names if not key.startswith('blocks.1')}
    assert named == found


def test_the_lines_of_the_docs_run(trained, monkeypatch):
    monkeypatch.chdir(trained)
    text = (ROOT / 'docs' / 'notebook.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    names = {}
    for block in blocks:
        if 'transformer_lens' not in block:
            exec(block, names)
    assert len(blocks) >= 5 and {'m', 'run'} <= names.keys()
    assert names['at'] is at and analysis.load

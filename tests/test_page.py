"""The page that one can touch: nothing from a network, and in a browser hover, click and keys
change what they should. Where there is no chromium the tests with a browser are skipped."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from analysis_models import random_model, subject
from conftest import CHARS

from analysis import page, patching, report, token_loss
from analysis.subject import Subject
from model import GPT
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.dataset import write_splits
from runtime.tokenizer import make_tokenizer

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
PROMPT = 'abcab'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A report of two random models, of the parts that one can touch and one that one cannot."""
    folder = tmp_path_factory.mktemp('page')
    ids = np.random.default_rng(0).integers(len(CHARS), size=900).tolist()
    (folder / 'data').mkdir()
    write_splits(folder / 'data', ids[:600], ids[600:], make_tokenizer(CHARS))
    for model_class, name, rate in ((GPT, 'ckpt.pt', 1e-3), (GPT_MLA, 'ckpt_mla.pt', 2e-3)):
        save_checkpoint(folder / name, random_model(model_class), make_tokenizer(CHARS),
                        {'dataset': str(folder / 'data'), 'learning_rate': rate, 'batch_size': 4},
                        7, best_val_loss=1.25,
                        metrics=json.dumps({'iter': 0, 'val_loss': 2.5, 'train_loss': 2.6}) + '\n')
    with pytest.MonkeyPatch.context() as patch:
        names = ('attention_patterns', 'logit_lens', 'patching', 'token_loss', 'ioi', 'subspaces')
        patch.setattr(patching, 'LEAST_GAP', 1e-9)  # these models hardly differ
        patch.setattr(report, 'PARTS', {name: f'About <{name}>.' for name in names})
        models = [str(folder / name) for name in ('ckpt.pt', 'ckpt_mla.pt')]
        patch.setattr('sys.argv', ['report.py', *models, f'--out_dir={folder / "out"}',
                                   f'--prompt={PROMPT}'])
        report.main()
    return folder / 'out'


def test_the_page_begins_with_a_summary_and_ends_with_what_is_left_out(folder):
    text = (folder / 'report.html').read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text) and 'http' not in text
    rows = re.findall(r'<tr>(.*?)</tr>', text)
    cells = [re.findall(r'<t[hd]>(.*?)</t[hd]>', row) for row in rows[:10]]
    found = {head: values for head, *values in cells}
    assert found['val loss, estimated in training, nats'] == ['1.2500', '1.2500']
    assert found['cache, bytes per token in float32'] == ['256', '64']
    assert found['iterations'] == ['7', '7']
    assert 'learning_rate is 0.001 and 0.002' in text and 'batch_size is' not in text
    assert text.index('Left out') > text.index('id="samples"') and 'ioi for MHA' in text
    counts = [text.count(f'<h2 id="{name}"') for name in ('subspaces', 'ioi', 'training')]
    assert counts == [1, 0, 1]
    assert 'About &lt;patching&gt;.' in text


def test_both_models_are_asked_for_the_same_answers(folder):
    found = json.loads((folder / 'patching.json').read_text())
    asked = [(found[name]['answer'], found[name]['against']) for name in ('MHA', 'MLA')]
    assert asked[0] == asked[1]
    s = subject(random_model(GPT))
    own = patching.analyse(s, patching.Config(clean=PROMPT))
    assert asked[0] == (own.answer, own.against)


def test_the_data_of_a_page_cannot_end_its_script():
    text = page.page('<t>', 'body', {'a': '</script><b>'})
    assert '</script><b>' not in text and '<title>&lt;t&gt;' in text
    data = re.search(r'id="data">(.*?)</script>', text).group(1)
    assert json.loads(data) == {'a': '</script><b>'}
    assert page.numbers(np.array([[1.23456, np.nan]]), 2) == [[1.23, None]]


def test_what_the_page_says_is_what_was_computed(folder, monkeypatch):
    monkeypatch.setattr(patching, 'LEAST_GAP', 1e-9)
    text = (folder / 'report.html').read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))
    s = subject(random_model(GPT_MLA))
    run = s.run(PROMPT)
    pattern = run['blocks.1.attn.pattern'][0, 1]
    shown = data['attention_patterns MLA']['patterns'][1][1]
    for i, row in enumerate(shown):
        assert row == [round(1000 * value) for value in pattern[i, :i + 1].tolist()]
    lens = run.logit_lens()
    shown = data['logit_lens MLA residual stream']
    assert shown['probability'][2][:4] == pytest.approx(lens.stream.probability[2, :4], abs=1e-4)
    assert shown['probability'][2][4] is None and shown['rank'][2][0] == lens.stream.rank[2, 0]
    first = patching.analyse(subject(random_model(GPT)), patching.Config(clean=PROMPT))
    answers = {key: getattr(first, key).replace('␣', ' ').replace('↵', '\n')
               for key in ('answer', 'against')}
    made = patching.analyse(s, patching.Config(clean=PROMPT, **answers))
    maps = {one['title']: one for one in data['patching MLA']['maps']}
    shown = maps['output of a head']
    assert shown['rows'] == ['0.0', '0.1', '1.0', '1.1'] and shown['row'] == 'head'
    assert np.array(shown['values'], float) == pytest.approx(made.restored['attn.z'], abs=1e-3)
    kinds = data['token_loss']['kinds']
    assert [kind['title'] for kind in kinds] == ['MHA', 'MLA', 'MLA less MHA']
    losses = [np.array(kind['values'], float) for kind in kinds]
    assert losses[2] == pytest.approx(losses[1] - losses[0], abs=2e-3, nan_ok=True)


def test_a_text_of_one_model():
    tokenizer = make_tokenizer(CHARS)
    result = token_loss.TokenLoss(['one'], [['a', 'b']], np.array([[[np.nan, 2.0]]]), 2.6, 5)
    assert page.token_loss_data(result)['kinds'] == [
        {'title': 'one', 'values': [None, 2.0], 'end': 2.6, 'isSigned': False}]
    assert Subject(random_model(GPT), tokenizer, '', 'a').label == 'a'


SCRIPT = '''
const seen = {};
function info(box) { return box.querySelector('.info').textContent; }
function hover(cell) { cell.dispatchEvent(new MouseEvent('mouseenter')); }
function press(box, key) { box.dispatchEvent(new KeyboardEvent('keydown', {key})); }
const [one, two] = document.querySelectorAll('[data-part=attention]');
const spans = one.querySelectorAll('.tokens span'), others = two.querySelectorAll('.tokens span');
hover(spans[1]);
seen.reads = info(one);
seen.other = info(two);
seen.shades = [...spans].map(span => span.style.background);
hover(spans[3]);
seen.changed = info(one) !== seen.reads && spans[3].className === 'current';
const before = one.querySelector('.grid').innerHTML, title = one.querySelector('h3').textContent;
const button = [...one.querySelectorAll('button')]
  .find(one => one.getAttribute('aria-pressed') !== 'true');
button.click();
seen.clicked = [before !== one.querySelector('.grid').innerHTML,
                title !== one.querySelector('h3').textContent, button.getAttribute('aria-pressed')];
seen.head = one.querySelector('h3').textContent;
const pixels = one.querySelector('canvas').getContext('2d').getImageData(0, 0, 5, 5).data;
seen.corner = pixels[3];
seen.later = pixels[4 * 4 + 3];
const lens = document.querySelector('[data-part=logit_lens]');
hover(lens.querySelectorAll('td')[1]);
seen.lens = info(lens);
press(lens.querySelector('table'), 'ArrowDown');
seen.down = info(lens);
press(lens.querySelector('table'), 'ArrowLeft');
seen.left = info(lens);
const patch = document.querySelector('[data-part=patching]');
const select = patch.querySelector('select');
seen.rows = patch.querySelectorAll('tbody tr').length;
select.value = [...select.options].findIndex(option => option.text === 'output of a head');
select.dispatchEvent(new Event('change'));
seen.heads = patch.querySelectorAll('tbody tr').length;
hover(patch.querySelectorAll('td')[3]);
seen.patch = info(patch);
const text = document.querySelector('[data-part=token_loss]');
function colours() { return text.querySelector('.tokens').innerHTML; }
const coloured = colours();
text.querySelector('select').value = 0;
text.querySelector('select').dispatchEvent(new Event('change'));
seen.recoloured = coloured !== colours();
press(text.querySelector('.tokens'), 'ArrowRight');
press(text.querySelector('.tokens'), 'ArrowRight');
seen.loss = info(text);
seen.focusable = [...document.querySelectorAll('.tokens, .grid')].every(box => box.tabIndex === 0);
seen.errors = window.errors;
seen.fits = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
document.body.innerHTML = '<pre id="seen">' + JSON.stringify(seen).replaceAll('<', '') + '</pre>';
'''


@pytest.mark.skipif(not CHROMIUM, reason='needs chromium')
@pytest.mark.parametrize('width', [500, 1400])
def test_hover_click_and_keys_change_the_page(folder, tmp_path, width):
    text = (folder / 'report.html').read_text()
    catch = ('<script>errors = []; onerror = e => { errors.push(String(e)); }; '
             'console.error = onerror;</script>')
    text = text.replace('<style>', catch + '<style>', 1)
    text = text.replace('</body>', f'<script>{SCRIPT}</script></body>')
    (tmp_path / 'touched.html').write_text(text)
    ran = subprocess.run(
        [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--no-first-run', '--dump-dom',
         f'--window-size={width},900', f'--user-data-dir={tmp_path / "profile"}',
         f'file://{tmp_path / "touched.html"}'], capture_output=True, text=True, timeout=120)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert seen, ran.stdout[-2000:] + ran.stderr[-2000:]
    seen = json.loads(seen.group(1).replace('&amp;', '&').replace('&gt;', '>'))
    assert seen['errors'] == [] and seen['focusable'] and seen['fits']
    assert seen['reads'].startswith('Token 1, b, reads ') and seen['other'].startswith('Token 1, b')
    assert all(seen['shades'][:2]) and not any(seen['shades'][2:])
    assert seen['changed'] and seen['clicked'] == [True, True, 'true']
    assert re.fullmatch(r'Head [01]\.[01]: row reads column', seen['head'])
    assert seen['corner'] == 255 and seen['later'] == 0  # the first token reads itself alone
    assert seen['lens'].startswith('embedding, at b (1)   right: c, probability ')
    assert seen['down'].startswith('after 0, at b (1)')
    assert seen['left'].startswith('after 0, at a (0)')
    assert seen['rows'] == 2 and seen['heads'] == 4
    assert 'head 0.0, position 3' in seen['patch'] and '% restored' in seen['patch']
    assert seen['recoloured'], seen
    assert ' (1)   MHA ' in seen['loss'] and 'nats' in seen['loss'], seen['loss']

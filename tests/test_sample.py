import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BOTH, tiny_model
from test_checkpoint import save

import sample
from checkpoint import checkpoint_path
from model import GPT

ROOT = Path(sample.__file__).parent


@BOTH
def test_samples_without_data_and_the_seed_decides(model_class, tmp_path, program):
    save(checkpoint_path(tmp_path, model_class.model_type), tiny_model(model_class))
    args = [f'--out_dir={tmp_path}', '--device=cpu', '--num_samples=2', '--max_new_tokens=30', '--start=ab']
    runs = [program(lambda: sample.main(model_class.model_type), *args, f'--seed={seed}') for seed in (1, 1, 2)]
    assert [code for code, _, _ in runs] == [0, 0, 0]
    outs = [out for _, out, _ in runs]
    assert outs[0] == outs[1] != outs[2]
    header, body = outs[0].split('\n', 1)
    assert header.startswith(model_class.__name__)
    samples = body.split('\n---------------\n')
    assert len(samples) == 3 and samples[2] == ''
    assert all(len(text) == 32 and text.startswith('ab') for text in samples[:2]) and samples[0] != samples[1]


def test_padded_ids_are_never_drawn(tmp_path, program):
    model = tiny_model(GPT, vocab_size=64)
    save(tmp_path / 'ckpt.pt', model)  # its tokenizer has 14 characters, so ids from 14 on would not decode
    code, out, err = program(sample.main, f'--out_dir={tmp_path}', '--device=cpu', '--num_samples=3', '--temperature=5')
    assert code == 0, err


def test_prompts_from_files_and_longer_than_the_context(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    (tmp_path / 'prompt.txt').write_text('abc\n' * 10)
    code, out, _ = program(sample.main, f'--out_dir={tmp_path / "ckpt.pt"}', f'--start=FILE:{tmp_path / "prompt.txt"}',
                           '--device=cpu', '--num_samples=1', '--max_new_tokens=1')
    assert code == 0 and 'abc\n' * 10 in out


@pytest.mark.parametrize('args, words', [
    (['--start=é'], "has 'é', which the model's vocabulary of 14 characters lacks"), (['--start='], 'start is empty'),
    (['--start=FILE:nothing.txt'], 'start=FILE:nothing.txt cannot be read'), (['--top_k=0'], 'top_k=0 must be at least 1'),
    (['--temperature=-1'], 'temperature=-1.0 must be at least 0'), (['--num_samples=0'], 'num_samples=0'),
    (['--init_from=bert'], "init_from='bert' must be 'resume'"), (['--device=tpu'], "device='tpu'"),
    (['--out_dir=nothing'], 'there is no checkpoint nothing'), (['--temprature=1'], 'did you mean temperature?')])
def test_bad_input(args, words, tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    code, out, err = program(sample.main, f'--out_dir={tmp_path}', '--device=cpu', *args)
    assert code == 2 and words in err and err.startswith('error: ') and err.count('\n') == 1
    assert '---' not in out


@pytest.mark.parametrize('script, folder', [('sample.py', 'out'), ('sample_mla.py', 'out_mla')])
def test_programs_and_their_default_folders(script, folder, tmp_path):
    command = [sys.executable, ROOT / script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(f'error: there is no checkpoint {folder}/ckpt')
    assert done.stderr.count('\n') == 1

import pytest
import torch
from conftest import tiny_model
from test_checkpoint import save

import export_huggingface
from model import GPT
from model_mla import GPT_MLA
from runtime.loading import load_model
from runtime.tokenizer import gpt2_encoding


@pytest.mark.parametrize('settings', [dict(bias=True), dict(bias=False), dict(gelu='tanh')])
def test_transformers_computes_the_same_logits(settings, tmp_path, program):
    from transformers import GPT2LMHeadModel
    model = tiny_model(GPT, **settings)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    save(tmp_path / 'ckpt.pt', model)
    code, out, err = program(export_huggingface.main, tmp_path / 'ckpt.pt', tmp_path / 'hf')
    assert code == 0 and 'no tokenizer files' in out, err
    hf, report = GPT2LMHeadModel.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not any(report[f'{problem}_keys'] for problem in ('missing', 'unexpected', 'mismatched'))
    idx = torch.randint(14, (3, 16))
    torch.testing.assert_close(hf.eval()(idx).logits, model(idx, idx)[0], atol=1e-4, rtol=1e-4)
    back = GPT.from_pretrained(str(tmp_path / 'hf')).eval()
    assert torch.equal(back(idx, idx)[0], model(idx, idx)[0])
    assert back.config.gelu == model.config.gelu


def test_tokenizer_files_and_the_way_back(tmp_path, program):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = tiny_model(GPT, vocab_size=50304)
    save(tmp_path / 'ckpt.pt', model, 'gpt2')
    # the folder that holds the checkpoint
    code, out, err = program(export_huggingface.main, tmp_path, tmp_path / 'hf')
    assert code == 0 and 'tokenizer.json' in out and not (tmp_path / 'hf.partial').exists(), err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    for text in ("To be, or not to be: that's  the question\n\n", 'naïve 東京 🙂 <|endoftext|>'):
        ids = gpt2_encoding().encode(text, allowed_special='all')
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    assert tokenizer.model_max_length == 16
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    loaded = load_model(tmp_path / 'hf')
    idx = torch.randint(50257, (1, 9))
    torch.testing.assert_close(hf(idx).logits, loaded.model(idx, idx)[0], atol=1e-4, rtol=1e-4)
    assert loaded.tokenizer.spec == 'gpt2' and hf.config.eos_token_id == 50256


def test_bad_input_writes_nothing(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    save(tmp_path / 'ckpt_mla.pt', tiny_model(GPT_MLA))
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'model.safetensors').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    before = sorted(tmp_path.rglob('*'))
    for args, words in (((), 'takes two'), (('a', '--b'), 'takes two'),
                        (('a', 'b', 'c'), 'takes two'),
                        ((tmp_path / 'ckpt_mla.pt', tmp_path / 'new'), 'GPT_MLA'),
                        ((tmp_path / 'ckpt.pt', tmp_path / 'full'), 'not empty'),
                        ((tmp_path / 'ckpt.pt', tmp_path / 'file'), 'not empty'),
                        ((tmp_path / 'no.pt', tmp_path / 'new'), 'there is no checkpoint')):
        code, out, err = program(export_huggingface.main, *args)
        assert code == 2 and words in err and err.count('\n') == 1 and out == ''
    assert sorted(tmp_path.rglob('*')) == before
    assert (tmp_path / 'full' / 'model.safetensors').read_text() == 'mine'


def test_what_lies_beside_the_folder_stays(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    (tmp_path / 'hf.partial').mkdir()
    (tmp_path / 'hf.partial' / 'precious').write_text('x')
    code, _, err = program(export_huggingface.main, tmp_path / 'ckpt.pt', tmp_path / 'hf')
    assert code == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.pt', 'hf', 'hf.partial']
    assert (tmp_path / 'hf.partial' / 'precious').read_text() == 'x'

import pytest
import torch
from conftest import CHARS, tiny_model
from test_checkpoint import save

import export_huggingface
import train
from generate import generate
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import checkpoint_path
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
    assert code == 0 and 'tokenizer.json' in out and 'in place of' not in out, err
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
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'model.safetensors').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    before = sorted(tmp_path.rglob('*'))
    for args, words in (((), 'takes two'), (('a', '--b'), 'takes two'),
                        (('a', 'b', 'c'), 'takes two'),
                        ((tmp_path / 'ckpt.pt', tmp_path / 'full'), 'not empty'),
                        ((tmp_path / 'ckpt.pt', tmp_path / 'file'), 'not empty'),
                        ((tmp_path / 'no.pt', tmp_path / 'new'), 'there is no checkpoint')):
        code, out, err = program(export_huggingface.main, *args)
        assert code == 2 and words in err and err.count('\n') == 1 and out == ''
    assert sorted(tmp_path.rglob('*')) == before
    assert (tmp_path / 'full' / 'model.safetensors').read_text() == 'mine'


def random_weights(model):
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('make, said', [
    (lambda **s: tiny_model(GPT_MLA, n_latent=6, **s), 'its cache has 32 numbers per token and '
                                                       'layer in place of 6'),
    (lambda **s: tiny_model(GPT_MLA, n_latent=20, **s), 'in place of 20'),
    (lambda **s: tiny_model(GPT_KAhead, k_ahead=3, attention='mla', **s),
     'the 2 heads further ahead are left out'),
    (lambda **s: tiny_model(GPT_KAhead, k_ahead=2, attention='mha', head='linear', **s),
     'the 1 heads further ahead are left out')])
def test_the_other_models_are_written_as_a_gpt2(make, said, bias, tmp_path, program):
    """transformers gives the logits of the next token, and the same greedy text."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    model = random_weights(make(bias=bias))
    path = checkpoint_path(tmp_path, model.model_type)
    save(path, model)
    code, out, err = program(export_huggingface.main, path, tmp_path / 'hf')
    assert code == 0 and said in out, err
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    idx = torch.randint(14, (4, 16))
    with torch.no_grad():
        logits = torch.stack([model.next_logits(idx[:, :t]) for t in range(1, 17)], dim=1)
    torch.testing.assert_close(hf(idx).logits, logits, atol=2e-5, rtol=0)
    ours = generate(model, idx[:, :4], 12, 14, top_k=1)
    theirs = hf.generate(idx[:, :4], attention_mask=torch.ones(4, 4), max_new_tokens=12,
                         do_sample=False, pad_token_id=0)
    assert torch.equal(theirs, ours)
    back = load_model(tmp_path / 'hf')
    assert type(back.model) is GPT and back.tokenizer.spec == CHARS


def test_characters_travel_too(tmp_path, data_dir, tiny_args, program):
    from transformers import AutoTokenizer
    chars = ['\n', ' ', 'a', "'", '.', '東', '🙂', '<', 'é', '\u3000', '\t']
    save(tmp_path / 'ckpt.pt', tiny_model(GPT, vocab_size=len(chars)), chars)
    assert program(export_huggingface.main, tmp_path, tmp_path / 'hf')[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    for text in ("a  a. 'a é東🙂\n\n", ' a <\t\u3000 . a', '\n'):
        ids = [chars.index(char) for char in text]
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    with pytest.raises(Exception, match='UNK|unk'):
        tokenizer.encode('ab')
    assert tokenizer.model_max_length == 16
    assert load_model(tmp_path / 'hf').tokenizer.spec == chars

    # and back: a run starts from what was written, in its characters
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    assert program(export_huggingface.main, tmp_path, tmp_path / 'hf2')[0] == 0
    args = [arg for arg in tiny_args if not arg.startswith(('--n_', '--block_size'))]
    code, out, err = program(train.main, *args, f'--init_from={tmp_path / "hf2"}')
    assert code == 0 and 'unknown' not in out + err, err
    assert load_model(tmp_path / 'out').tokenizer.spec == CHARS


def test_what_lies_beside_the_folder_stays(tmp_path, program):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    (tmp_path / 'hf.partial').mkdir()
    (tmp_path / 'hf.partial' / 'precious').write_text('x')
    code, _, err = program(export_huggingface.main, tmp_path / 'ckpt.pt', tmp_path / 'hf')
    assert code == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.pt', 'hf', 'hf.partial']
    assert (tmp_path / 'hf.partial' / 'precious').read_text() == 'x'

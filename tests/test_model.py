import ast
import json
import math
import shutil
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import BOTH, tiny_model

import model as model_module
from model import GPT, GPTConfig
from model_mla import GPT_MLA
from runtime.cross_entropy import linear_cross_entropy
from runtime.device import autocast


def test_the_models_file_imports_torch_alone():
    tree = ast.parse(Path(model_module.__file__).read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    packages = {name.partition('.')[0] for name in names}
    assert packages - sys.stdlib_module_names == {'torch'}


@pytest.fixture(scope='module', params=['gelu_new', 'gelu'])
def hugging_face(request, tmp_path_factory):
    """A directory with a small GPT-2 of transformers' with random weights, and that model. GPT-2's
    GELU is gelu_new, the tanh form; nanoGPT's is gelu, the exact one."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=24, n_embd=32, n_layer=3, n_head=4,
                                    activation_function=request.param)).eval()
    for p in hf.parameters():  # norms and biases too, which start at ones and zeros
        p.data += 0.5 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp('hf')
    hf.save_pretrained(folder)
    return folder, hf


def test_same_logits_and_loss_as_transformers(hugging_face):
    folder, hf = hugging_face
    model = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(50, (3, 24))
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    peer = hf(idx[:, :-1]).logits
    torch.testing.assert_close(logits, peer, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, hf(idx, labels=idx).loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(idx[:, :-1])[0], peer[:, -1:], atol=1e-4, rtol=1e-4)


def test_from_pretrained_overrides_dropout_and_refuses_other_attention(hugging_face):
    folder, _ = hugging_face
    assert GPT.from_pretrained(str(folder), {'dropout': 0.25}).transformer.h[0].attn.dropout == 0.25
    with pytest.raises(ValueError, match='multi-head attention'):
        GPT_MLA.from_pretrained(str(folder))


def test_from_pretrained_needs_no_network_for_what_is_on_disk(hugging_face, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError('a socket was opened')
    monkeypatch.setattr(socket, 'socket', no_network)
    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    assert GPT.from_pretrained(str(hugging_face[0])).config.n_layer == 3


# with and without the head that save_pretrained is called on
@pytest.mark.parametrize('prefix', ['transformer.', ''])
def test_from_pretrained_reads_bin_files_too(hugging_face, prefix, tmp_path):
    folder, hf = hugging_face
    hf.config.save_pretrained(tmp_path)
    source = hf if prefix else hf.transformer
    state = {k: v for k, v in source.state_dict().items() if k != 'lm_head.weight'}
    # the buffer that old versions wrote
    state |= {f'{prefix}h.0.attn.bias': torch.ones(1, 1, 24, 24).tril()}
    torch.save(state, tmp_path / 'pytorch_model.bin')
    idx = torch.randint(50, (2, 24))
    ours, wanted = (GPT.from_pretrained(str(path)).eval() for path in (tmp_path, folder))
    assert torch.equal(ours(idx)[0], wanted(idx)[0])


def test_attention_is_its_definition_in_float64():
    attn = tiny_model(GPT, bias=True).double().transformer.h[0].attn
    for p in attn.parameters():
        p.data = torch.randn_like(p)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    out = torch.zeros(2, 7, 16, dtype=torch.float64)
    W, b = attn.c_attn.weight, attn.c_attn.bias
    for batch in range(2):
        q, k, v = (x[batch] @ W[i * 16:(i + 1) * 16].T + b[i * 16:(i + 1) * 16] for i in range(3))
        for t in range(7):
            for head in (slice(0, 8), slice(8, 16)):
                weights = torch.softmax(k[:t + 1, head] @ q[t, head] / math.sqrt(8), 0)
                out[batch, t, head] = weights @ v[:t + 1, head]
    wanted = out @ attn.c_proj.weight.T + attn.c_proj.bias
    torch.testing.assert_close(attn(x), wanted, atol=1e-12, rtol=1e-12)


@BOTH
def test_head_weights_are_the_maps_that_heads_apply(model_class):
    attn = tiny_model(model_class, bias=False).transformer.h[0].attn.double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    W_Q, W_K, W_V, W_O = attn.head_weights()
    for W, projected in zip((W_Q, W_K, W_V), attn.heads(x)):
        torch.testing.assert_close(torch.einsum('bte,hed->bhtd', x, W), projected)
    q, k, v = attn.heads(x)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    pattern = scores.softmax(-1)
    torch.testing.assert_close(torch.einsum('bhtd,hde->bte', pattern @ v, W_O), attn(x))


@BOTH
def test_the_future_does_not_reach_the_past(model_class):
    model = tiny_model(model_class)
    idx = torch.randint(14, (2, 16))
    changed = idx.clone()
    changed[:, 9:] = (idx[:, 9:] + 1) % 14
    a, b = (model(i, i)[0] for i in (idx, changed))
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.isclose(a[:, 9:], b[:, 9:]).all(-1).any()


@BOTH
@pytest.mark.parametrize('bias', [True, False])
def test_gradients_reach_every_parameter(model_class, bias):
    model = tiny_model(model_class, bias=bias).train()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    idx = torch.randint(14, (4, 16))
    model(idx, idx)[1].backward()
    for name, p in model.named_parameters():
        # the bias of the keys adds the same to every score: no softmax feels it
        if not name.endswith('key.bias'):
            assert p.grad.abs().max() > 1e-6, name


def test_targets_of_minus_one_do_not_count():
    model = tiny_model(GPT)
    idx = torch.randint(14, (2, 16))
    some = idx.clone()
    some[:, 5:] = -1
    logits, loss = model(idx, some)
    wanted = -logits.log_softmax(-1)[:, :5].gather(2, idx[:, :5, None]).mean()
    torch.testing.assert_close(loss, wanted)


@BOTH
def test_dropout_acts_on_attention_and_residual_in_training_alone(model_class):
    model = tiny_model(model_class, dropout=0.5)
    attn, x = model.transformer.h[0].attn, torch.randn(1, 16, 16)
    assert torch.equal(attn(x), attn(x))
    attn.train()
    assert (attn(x) == 0).float().mean() > 0.2  # of the residual
    attn.resid_dropout.p = 0.0
    assert not torch.isclose(attn(x), attn(x)).all()  # of the attention weights


def test_number_of_parameters_is_that_of_gpt2():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808  # as published weights have
    assert model.get_num_params() == 124_439_808 - 1024 * 768


def test_dropout_acts_on_embeddings_and_mlp_too():
    model = tiny_model(GPT, dropout=0.5).train()
    x, idx = torch.randn(4, 16, 16), torch.randint(14, (1, 16))
    assert 0.4 < (model.transformer.h[0].mlp(x) == 0).float().mean() < 0.6
    model.transformer.h = torch.nn.ModuleList()  # what is left is the embeddings
    assert not torch.equal(model(idx)[0], model(idx)[0])


@BOTH
def test_biases_start_at_zero(model_class):
    model = tiny_model(model_class, bias=True)
    biases = [p for name, p in model.named_parameters() if name.endswith('bias')]
    assert biases and not any(p.any() for p in biases)


@pytest.mark.parametrize('variant', [
    dict(layer_norm_epsilon=1e-6), dict(scale_attn_by_inverse_layer_idx=True),
    dict(activation_function='relu')])
def test_variants_of_gpt2_that_it_does_not_compute_are_refused(variant, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    settings = dict(vocab_size=14, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(GPT2Config(**settings, **variant)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='variant of GPT-2'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('change, words', [
    (dict(n_layer=4), 'missing transformer.h.3'), (dict(n_layer=2), 'unexpected transformer.h.2'),
    (dict(n_positions=32), 'mismatched .*wpe'), (dict(n_inner=64), 'variant'),
    (dict(model_type='bert'), "type 'bert'")])
def test_weights_that_do_not_fit_their_config_are_refused(hugging_face, change, words, tmp_path):
    shutil.copytree(hugging_face[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(str(tmp_path))


def test_initial_standard_deviations():
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            wanted = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
            assert p.std().item() == pytest.approx(wanted, rel=0.05), name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_crop_block_size_keeps_the_positions_that_are_left():
    model = tiny_model(GPT)
    idx = torch.randint(14, (1, 8))
    before = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(ValueError, match='does not fit'):
        model(torch.randint(14, (1, 9)))
    with pytest.raises(ValueError, match='block_size'):
        model.crop_block_size(9)


@BOTH
def test_only_matrices_decay(model_class):
    model = tiny_model(model_class, bias=True)
    decaying, others = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    assert decaying['weight_decay'] == 0.1 and others['weight_decay'] == 0
    matrices = {id(p) for p in model.parameters() if p.dim() == 2}
    assert {id(p) for p in decaying['params']} == matrices
    assert len(decaying['params']) + len(others['params']) == len(list(model.parameters()))


def test_mfu_by_hand():
    model = tiny_model(GPT, bias=False)
    n = 14 * 16 + 2 * (12 * 16 * 16 + 2 * 16) + 16  # embedding, blocks, ln_f
    flops = (6 * n + 12 * 2 * 16 * 16) * 16 * 10
    assert model.estimate_mfu(10, dt=2.0, peak=1e9) == pytest.approx(flops / 2.0 / 1e9)


@pytest.mark.parametrize('dtype, precision', [
    (torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_loss_in_chunks_and_its_gradients_are_the_definitions(dtype, precision):
    """Under autocast, with rows that have no target and a last chunk that is not full."""
    torch.manual_seed(0)
    x, W = torch.randn(23, 12).double(), torch.randn(31, 12).double()
    targets = torch.randint(31, (23,)).masked_fill(torch.arange(23) % 5 == 0, -1)
    weights, found = torch.rand(23, dtype=torch.float64), []
    for max_logits in (31 * 4, 10 ** 6):
        a, b = (t.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for t in (x, W))
        with nullcontext() if dtype == torch.float64 else autocast('cpu', dtype):
            loss, losses = linear_cross_entropy(a, b, targets, weights, max_logits)
        (3 * loss).backward()
        found.append([loss, losses, a.grad, b.grad])
    wanted = [t.requires_grad_() for t in (x, W)]
    losses = torch.stack([-row.log_softmax(0)[t] * (t >= 0) for row, t in zip(x @ W.T, targets)])
    loss = sum(w * loss for w, loss in zip(weights, losses))
    (3 * loss).backward()
    wanted = [loss, losses, x.grad, W.grad]
    for results in found:
        for got, want in zip(results, wanted, strict=True):
            assert (got - want).norm() <= precision * want.norm()


def test_a_loss_in_chunks_without_gradients_makes_none():
    W = torch.randn(31, 12, requires_grad=True)
    with torch.no_grad():
        x, targets, weights = torch.randn(23, 12), torch.arange(23), torch.ones(23)
        loss, losses = linear_cross_entropy(x, W, targets, weights, 31 * 4)
    assert not loss.requires_grad and loss == losses.sum() and losses.min() > 0
    none = torch.tensor([-1, -1])
    assert linear_cross_entropy(torch.randn(2, 12), W, none, torch.ones(2), 31)[0] == 0


def test_half_precision_gradients_of_a_chunked_loss_do_not_vanish():
    """What float16 cannot hold is scaled before it is rounded: 1 / N of the loss comes last."""
    torch.manual_seed(0)
    x, W = torch.randn(4096, 16, dtype=torch.float16), torch.randn(300, 16, dtype=torch.float16)
    targets = torch.randint(300, (4096,))
    grads = []
    for a, b in ((x, W), (x.double(), W.double())):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        total, _ = linear_cross_entropy(a, b, targets, torch.ones(4096), 300 * 512)
        (2.0 ** 13 / 4096 * total).backward()
        grads.append(a.grad.double())
    assert (grads[0] - grads[1]).norm() < 0.01 * grads[1].norm()

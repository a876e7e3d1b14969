"""The analyses of a prompt: logit lens, attribution, patching and token loss, against their
definitions and hooks written by hand, in float64."""

from configurator import UserError

import numpy as np
import pytest
import torch
from analysis_models import induction_model, random_model, subject
from conftest import CHARS
from family import EACH, member
from test_notebook import hook, logits

from analysis import attribution, logit_lens, patching, token_loss
from analysis.subject import Subject
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.tokenizer import make_tokenizer

CLEAN, CORRUPTED = 'abcabdab cab', 'abcabeab cab'


def double(name):
    return subject(member(name).double())


@EACH
def test_the_lens_is_the_final_norm_and_unembedding_of_each_stream(name):
    s = double(name)
    found, n = s.run(CLEAN).logit_lens(), s.model.config.n_layer
    ids = s.tokenizer.encode(CLEAN)
    streams = []
    hooks = [hook(s.model.transformer.drop, lambda x: streams.append(x) or x)]
    hooks += [hook(block, lambda x: streams.append(x) or x) for block in s.model.transformer.h]
    last = logits(s, CLEAN, *hooks)[0]
    assert len(streams) == n + 1 == len(found.stream.rows)
    for row, x in enumerate(streams):
        ln_f = s.model.transformer.ln_f
        scale = (x[0].var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = (x[0] - x[0].mean(-1, keepdim=True)) / scale
        p = ((x * ln_f.weight + ln_f.bias) @ s.model.lm_head.weight.T).softmax(-1)
        for t, right in enumerate(ids[1:]):
            assert found.stream.probability[row, t] == pytest.approx(p[t, right].item(), abs=1e-6)
            assert found.stream.rank[row, t] == 1 + (p[t] > p[t, right]).sum()
            best = CHARS[int(p[t].argmax())].replace(' ', '␣').replace('\n', '↵')
            assert found.stream.guesses[row][t][0] == best
    wanted = last.softmax(-1)[-1].max().item()
    assert found.stream.guess_probability[-1, -1, 0] == pytest.approx(wanted, abs=1e-6)
    assert np.isnan(found.stream.rank[:, -1]).all()
    assert found.source == ('latent' if isinstance(s.model, GPT_MLA) else 'values')


@EACH
def test_the_lens_of_a_latent_alone_is_attention_of_each_token_to_itself(name):
    s = double(name)
    found, ids = s.run(CLEAN).logit_lens(), s.tokenizer.encode(CLEAN)
    for layer in (0, 1):
        eye = {f'blocks.{layer}.attn.pattern': lambda p: torch.eye(p.size(-1)).expand_as(p)}
        alone = s.run(CLEAN, edit=eye)[f'blocks.{layer}.attn_out']
        with torch.no_grad():
            p = s.model.unembed(alone)[0].softmax(-1)
        for t, right in enumerate(ids[1:]):
            assert found.alone.probability[layer, t] == pytest.approx(p[t, right].item(), abs=1e-6)


def test_a_lens_and_an_attribution_of_one_sequence_of_a_run_with_edits():
    """Edits are those of the whole run, also where they differ between its sequences."""
    s = double('deepseek')
    texts, z = [CLEAN, CORRUPTED], 'blocks.0.attn.z'
    other = s.run(texts[::-1])[z]
    both = s.run(texts, edit={z: other, 'blocks.1.resid_pre': lambda x: 2 * x})
    for sequence, text in enumerate(texts):
        edit = {z: other[[sequence]], 'blocks.1.resid_pre': lambda x: 2 * x}
        alone = s.run(text, edit=edit)
        mine, theirs = both.logit_lens(sequence), alone.logit_lens()
        for one, two in ((mine.stream, theirs.stream), (mine.alone, theirs.alone)):
            assert one.probability == pytest.approx(two.probability, nan_ok=True)
        assert mine.tokens == theirs.tokens
        one = s.run(texts, edit={z: other}).attribution('c', 'b', 3, sequence)
        two = s.run(text, edit={z: other[[sequence]]}).attribution('c', 'b', 3)
        assert one.heads == pytest.approx(two.heads) and one.difference == pytest.approx(
            two.difference)
    # what a latent alone says counts with the edits of its block
    changed = s.run(CLEAN, edit={'blocks.1.attn.latent': lambda c: 0 * c}).logit_lens()
    assert np.ptp(changed.alone.probability[1, :-1]) > 0
    same = np.unique(np.round(changed.alone.guess_probability[1, :, 0], 9))
    assert len(same) == 1  # all tokens write the same


def test_a_lens_of_one_token_says_that_nothing_is_known():
    result = logit_lens.analyse(subject(random_model(GPT)), logit_lens.Config(prompt='a'))
    assert np.isnan(result.stream.rank).all() and 'stream' in logit_lens.table(result)
    logit_lens.plot({'MHA': result})


@EACH
def test_attribution_adds_up_and_each_part_is_what_a_hook_takes_away(name):
    s = double(name)
    run = s.run(CLEAN)
    for against, position in (('b', -1), ('', 4)):
        found = run.attribution('c', against, position)
        row = logits(s, CLEAN)[0, position]
        c, b = s.tokenizer.encode('cb')
        wanted = row[c] - (row[b] if against else row[:s.n_vocab].mean())
        assert found.difference == pytest.approx(wanted.item(), abs=1e-9)
        total = found.heads.sum() + found.mlps.sum() + found.embedding + found.positions
        assert total + found.biases == pytest.approx(found.difference, abs=1e-9)
    # the last block's parts, with the scale of the final norm held
    norm, last = s.model.transformer.ln_f, s.model.config.n_layer - 1
    seen = []
    logits(s, CLEAN, hook(norm, lambda x: seen.append(x[0]) or x[0], reads=True))
    found = run.attribution('c', 'b')
    x = run[f'blocks.{last}.resid_post'][0, -1]
    scale = (x.var(correction=0) + 1e-5).sqrt()
    direction = s.model.lm_head.weight[c] - s.model.lm_head.weight[b]
    for head in range(s.model.config.n_head):
        z = run[f'blocks.{last}.attn.z'][0, head, -1]
        W_O = s.model.transformer.h[last].attn.head_weights()[-1][head]
        part = z @ W_O
        wanted = ((part - part.mean()) / scale * norm.weight) @ direction
        assert found.heads[last, head] == pytest.approx(wanted.item(), abs=1e-9)


def test_attribution_of_a_run_with_edits():
    s = double('mla')
    run = s.run(CLEAN, edit={'blocks.1.attn.z': 0, 'blocks.0.attn.pattern': lambda p: p.flip(1)})
    found = run.attribution('c', 'b')
    c, b = s.tokenizer.encode('cb')
    assert found.difference == pytest.approx((run.logits[0, -1, c] - run.logits[0, -1, b]).item())
    assert np.abs(found.heads[1]).max() == 0 < np.abs(found.heads[0]).max()
    with pytest.raises(UserError, match='blocks.1.resid_mid is edited'):
        s.run(CLEAN, edit={'blocks.1.resid_mid': 0}).attribution('c')
    with pytest.raises(UserError, match='position=12'):
        s.run(CLEAN).attribution('c', position=12)
    with pytest.raises(UserError, match="answer='ee' is 2 tokens, which do not stand"):
        s.run(CLEAN).attribution('ee')
    with pytest.raises(UserError, match="against='abc' is 3 tokens and answer='ca' 2"):
        s.run(CLEAN).attribution('ca', 'abc')


@pytest.mark.parametrize('name', ['mha', 'deepseek'])
def test_attribution_of_a_word_is_that_of_its_letters_where_they_stand(name):
    s = double(name)
    run = s.run(CLEAN)  # abcabdab cab
    word, others = run.attribution('cab', 'bad'), [
        run.attribution(one, two, place) for one, two, place in
        (('c', 'b', 8), ('a', 'a', 9), ('b', 'd', 10))]
    assert word.places == [8, 9, 10] and word.answer == 'cab' and word.against == 'bad'
    for field in ('difference', 'embedding', 'positions', 'biases', 'heads', 'mlps'):
        total = sum(getattr(one, field) for one in others)
        assert getattr(word, field) == pytest.approx(total, abs=1e-9), field
    assert '3 tokens together' in attribution.table(word)
    attribution.plot({'one': word})


def difference(s, text, answer, against, *contexts):
    row = logits(s, text, *contexts)[0, -1]
    return (row[answer] - row[against]).item()


def put(module, theirs, where, reads=False):
    """A hook that puts theirs into the part of what a module returns or reads that where names."""
    def change(value):
        value = value.clone()
        value[where] = theirs[where]
        return value
    return hook(module, change, reads)


@EACH
def test_patching_is_what_hooks_do(name, monkeypatch):
    monkeypatch.setattr(patching, 'LEAST_GAP', 1e-9)  # some of these models hardly differ
    s = double(name)
    config = patching.Config(clean=CLEAN, corrupted=CORRUPTED, answer='c', against='b')
    result = patching.analyse(s, config)
    c, b = s.tokenizer.encode('cb')
    clean, corrupted = (difference(s, text, c, b) for text in (CLEAN, CORRUPTED))
    assert (result.clean, result.corrupted) == pytest.approx((clean, corrupted), abs=1e-9)
    run, head_dim = s.run(CLEAN), s.model.config.head_dim

    def share(*contexts):
        return (difference(s, CORRUPTED, c, b, *contexts) - corrupted) / (clean - corrupted)
    for layer, block in enumerate(s.model.transformer.h):
        name = f'blocks.{layer}.'
        for t in (5, 7, 11):
            at = (slice(None), t)
            for component, module, reads in (('resid_pre', block, True),
                                             ('attn_out', block.attn, False),
                                             ('mlp_out', block.mlp, False)):
                if module is not None:
                    wanted = share(put(module, run[name + component], at, reads))
                    got = result.restored[component][layer, t]
                    assert got == pytest.approx(wanted, abs=1e-6), (component, layer, t)
            z = run[f'{name}attn.z'].transpose(1, 2).flatten(2)
            for head in (0, 1):
                part = (slice(None), t, slice(head * head_dim, (head + 1) * head_dim))
                wanted = share(put(block.attn.c_proj, z, part, reads=True))
                got = result.restored['attn.z'][layer * s.model.config.n_head + head, t]
                assert got == pytest.approx(wanted, abs=1e-6)
            if isinstance(s.model, GPT_MLA):
                latent = run[f'{name}attn.latent']
                wanted = share(put(block.attn.key, latent, at, True),
                               put(block.attn.value, latent, at, True))
                got = result.restored['attn.kv_latent'][layer, t]
                assert got == pytest.approx(wanted, abs=1e-6)
    assert result.restored['resid_pre'][0, 5] == pytest.approx(1)
    assert np.abs(result.restored['resid_pre'][:, :5]).max() < 1e-9
    assert result.left_out == ([] if isinstance(s.model, GPT_MLA) else ['attn.kv_latent'])
    patching.plot({'one': result, 'two': result})


@pytest.mark.parametrize('name', ['mha', 'gqa', 'gqa, rotary', 'mla', 'deepseek'])
def test_paths_are_what_hooks_do(name, monkeypatch):
    """Wang et al. 2023, section 3.1, in three passes with hooks."""
    monkeypatch.setattr(patching, 'LEAST_GAP', 1e-9)
    s = subject(member(name, n_layer=3).double())
    config = patching.Config(clean=CLEAN, corrupted=CORRUPTED, answer='c', against='b',
                             receiver='2.1', components='attn_out')
    result, (c, b) = patching.analyse(s, config), s.tokenizer.encode('cb')
    clean, corrupted = (difference(s, text, c, b) for text in (CLEAN, CORRUPTED))
    h, head_dim, n_head = s.model.transformer.h, s.model.config.head_dim, s.model.config.n_head
    z = {text: [s.run(text)[f'blocks.{layer}.attn.z'].transpose(1, 2).flatten(2)
                for layer in range(3)] for text in (CLEAN, CORRUPTED)}
    for layer, head in ((0, 0), (1, 1)):
        part = (..., slice(head * head_dim, (head + 1) * head_dim))
        freeze = [hook(h[i].attn.c_proj, lambda _, i=i: z[CORRUPTED][i], reads=True)
                  for i in range(2)]
        freeze.append(put(h[layer].attn.c_proj, z[CLEAN][layer], part, reads=True))
        read, seen = h[2].ln_1, []
        logits(s, CORRUPTED, *freeze, hook(read, lambda x: seen.append(x) or x))
        for kind in 'qkv':
            # the receiver's q, k or v from the stream that was seen, all else as it is
            attn, heads = h[2].attn, h[2].attn.heads

            def mixed(x, start=0, tap=None):
                own, sent = list(heads(x)), heads(seen[0])
                place = 'qkv'.index(kind)
                n = attn.n_kv_head if hasattr(attn, 'n_kv_head') and kind != 'q' else n_head
                group = n_head // n
                first = 1 // group * group
                own[place] = own[place].clone()
                own[place][:, first:first + group] = sent[place][:, first:first + group]
                return own
            stream = s.run(CORRUPTED)['blocks.2.resid_pre']
            q, k, v = mixed(h[2].ln_1(stream))
            pattern = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(
                torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
            out = (pattern @ v).transpose(1, 2).flatten(2)
            wanted = difference(s, CORRUPTED, c, b,
                                hook(attn.c_proj, lambda _, out=out: out, reads=True))
            got = result.paths[kind][layer, head]
            assert got == pytest.approx((wanted - corrupted) / (clean - corrupted), abs=1e-6)
    assert np.isnan(result.paths['q'][2]).all()
    assert 'paths into k of 2.1' in patching.table(result)
    patching.plot({'one': result})


def test_patching_finds_the_circuit_of_a_model_made_by_hand():
    """Tokens 3 5 ... 3: the induction head 1.0 looks at the token after the first 3. The pair
    differs in the first 3. What carries the difference is known: the embedding of the first 3, then
    head 0.0 at the place after it, then head 1.0 at the last place, by its keys."""
    model = induction_model()
    s = Subject(model, make_tokenizer([chr(97 + i) for i in range(16)]), '', 'by hand')
    # the last stream holds what head 1.0 writes in the direction of the token: none here, so read
    # its pattern through a value that is written
    model.transformer.h[1].attn.c_attn.weight.data[128:144, 0:16] = torch.eye(16)
    model.transformer.h[1].attn.c_proj.weight.data[0:16, 0:16] = 4 * torch.eye(16)
    config = patching.Config(clean='adfhbgca', corrupted='edfhbgca', answer='d', receiver='1.0')
    result = patching.analyse(s, config)
    assert result.clean - result.corrupted > 0.5
    best = {name: np.unravel_index(shares.argmax(), shares.shape)
            for name, shares in result.restored.items()}
    assert best['attn.pattern'] == (1, 0) and result.restored['attn.pattern'][1, 0] > 0.9
    z = result.restored['attn.z']
    # head 0.0 at the place behind the first one, and head 1.0 at the last place
    assert {divmod(place, 8) for place in z.argsort(axis=None)[-2:].tolist()} == {(0, 1), (4, 7)}
    assert z[0, 1] > 0.9 and z[4, 7] > 0.9 and np.sort(z, axis=None)[-3] < 0.3
    assert result.restored['resid_pre'][1, 1] > 0.9
    assert result.paths['k'][0, 0] > 0.9
    assert abs(result.paths['q'][0, 0]) < 0.1 and np.nanmax(abs(result.paths['k'][0, 1:])) < 0.1


@pytest.mark.parametrize('settings, words', [
    (dict(clean='abc', corrupted='abcd'), ['3 tokens', 'corrupted 4']),
    (dict(clean='abc', corrupted='abc'), ['the same tokens']),
    (dict(clean='aaaa'), ['one kind of token']),
    (dict(clean='abc', corrupted='abd', answer='a', against='a'), ['answer and against']),
    (dict(clean='abc', corrupted='abd', components='attn.zz'), ["'attn.zz'", 'attn.z']),
    (dict(clean='abc', corrupted='abd', receiver='9.0'), ['receiver=', '1.1']),
    (dict(clean='abc', corrupted='abd', receiver='0.0'), ['receiver=0.0', 'first layer']),
    (dict(clean=17 * 'a'), ['17 tokens', 'block_size=16']),
    (dict(), ['clean is empty', 'names no data']),
])
def test_mistakes_in_patching(settings, words):
    with pytest.raises(UserError) as e:
        patching.analyse(subject(random_model(GPT)), patching.Config(**settings))
    assert all(word in str(e.value) for word in words), e.value


def test_prompts_that_end_alike_restore_nothing():
    s = subject(random_model(GPT))
    for block in s.model.transformer.h:
        for name in ('attn', 'mlp'):
            getattr(block, name).c_proj.weight.data.zero_()
    result = patching.analyse(s, patching.Config(clean='abca', corrupted='abba'))
    assert np.isnan(result.restored['attn.z']).all()
    assert 'too little to restore' in patching.table(result)
    patching.plot({'one': result})


def text_subject(model, data_dir):
    return Subject(model, make_tokenizer(CHARS), str(data_dir), 'a/model')


def test_token_losses_are_cross_entropies_of_both_models(data_dir):
    one = text_subject(random_model(GPT).double(), data_dir)
    two = text_subject(random_model(GPT_KAhead, seed=1, attention='mla').double(), data_dir)
    config = token_loss.Config(max_tokens=64)
    result = token_loss.compare(one, two, config)
    idx = torch.cat(one.windows('', 64, 16))
    assert result.losses.shape == (2, 4, 17) and np.isnan(result.losses[:, :, 0]).all()
    for losses, s in zip(result.losses, (one, two)):
        with torch.no_grad():
            rows = s.model.unembed(s.model.last_stream(idx[:, :-1])).log_softmax(-1)
        wanted = -rows.gather(-1, idx[:, 1:, None])[..., 0]
        assert losses[:, 1:] == pytest.approx(wanted.numpy(), abs=1e-5)
    gaps = abs(np.nan_to_num(result.losses[1] - result.losses[0]))
    window, place = np.unravel_index(gaps.argmax(), gaps.shape)
    lines = token_loss.table(result).splitlines()
    first = lines[lines.index(next(line for line in lines if 'differ most' in line)) + 1]
    a, b = result.losses[:, window, place]
    assert f'{b - a:+.2f}' == first.split()[-1]
    assert '+- ' in lines[2] and 'unknown' not in lines[2]
    token_loss.plot({'both': result})
    alone = token_loss.compare(one, None, token_loss.Config(max_tokens=16))
    assert 'hardest' in token_loss.table(alone)
    token_loss.plot({'one': alone})
    one_window = token_loss.compare(one, two, token_loss.Config(max_tokens=16))
    assert '+- unknown' in token_loss.table(one_window)


def test_two_models_that_read_other_tokens_are_refused(data_dir):
    one = text_subject(random_model(GPT), data_dir)
    two = Subject(random_model(GPT), make_tokenizer(CHARS[::-1]), str(data_dir), 'b/model')
    with pytest.raises(UserError, match='same tokens'):
        token_loss.compare(one, two, token_loss.Config())

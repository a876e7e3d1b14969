"""
The forms in which transformers computes the models of this project, and the way between their
weights and ours. What a form lacks, such as a small cache, is multiplied out.

    gpt2          learned positions; GQA and MLA become MHA
    gpt_neox      rotary='all'; MLA becomes MHA
    starcoder2    rotary='all' with groups of heads
    llama         rotary='all' with mlp='gated', without biases; MLA becomes MHA
    deepseek_v3   rotary='decoupled' with latent_norm and mlp='gated', without biases

The last two have RMS norms where our layer norms subtract the mean. Without biases that is the same
if all that is written to the residual stream is centred, which changes nothing for us: each reader
subtracts the mean. The unembedding is then no longer the embedding and is written beside it.
"""

from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import torch

from model import GPT
from model_mla import GPT_MLA

CLASSES = {'gpt2': 'GPT2', 'gpt_neox': 'GPTNeoX', 'starcoder2': 'Starcoder2', 'llama': 'Llama',
           'deepseek_v3': 'DeepseekV3'}  # a form is transformers' model_type
ARTICLES = {'gpt2': 'a GPT-2', 'gpt_neox': 'a GPT-NeoX', 'starcoder2': 'a Starcoder2',
            'llama': 'a Llama', 'deepseek_v3': 'a DeepSeek-V3 with dense MLPs'}
HAS_RMS_NORM = ('llama', 'deepseek_v3')
GELUS = {'none': 'gelu', 'tanh': 'gelu_new'}
OUR_GELUS = {'gelu': 'none', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh'}
# GPT-2's Conv1D keeps these weights the other way round than Linear
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
# buffers in weights that old versions wrote
MASKS = ('.attn.bias', '.attn.masked_bias')
# parts of our names, and theirs, in the order in which ours become theirs
LLAMA = {'transformer.wte.': 'model.embed_tokens.', 'transformer.ln_f.': 'model.norm.',
         'transformer.h.': 'model.layers.', '.ln_1.': '.input_layernorm.',
         '.ln_2.': '.post_attention_layernorm.', '.attn.': '.self_attn.',
         '.self_attn.c_proj.': '.self_attn.o_proj.', '.mlp.c_gate.': '.mlp.gate_proj.',
         '.mlp.c_fc.': '.mlp.up_proj.', '.mlp.c_proj.': '.mlp.down_proj.'}
NAMES = {
    'gpt2': {},
    'gpt_neox': {'transformer.wte.': 'gpt_neox.embed_in.', 'lm_head.': 'embed_out.',
                 'transformer.ln_f.': 'gpt_neox.final_layer_norm.',
                 'transformer.h.': 'gpt_neox.layers.', '.ln_1.': '.input_layernorm.',
                 '.ln_2.': '.post_attention_layernorm.', '.attn.c_proj.': '.attention.dense.',
                 '.attn.c_attn.': '.attention.query_key_value.',
                 '.mlp.c_fc.': '.mlp.dense_h_to_4h.', '.mlp.c_proj.': '.mlp.dense_4h_to_h.'},
    'starcoder2': LLAMA | {'.mlp.c_fc.': '.mlp.c_fc.', '.mlp.c_proj.': '.mlp.c_proj.'},
    'llama': LLAMA,
    'deepseek_v3': LLAMA | {'.self_attn.latent_enc.': '.self_attn.kv_a_proj_with_mqa.',
                            '.self_attn.query_enc.': '.self_attn.q_a_proj.'},
}


# keys of their configs that change nothing that is computed
FREE = {'transformers_version', 'dtype', 'architectures', 'initializer_range', 'use_cache',
        'bos_token_id', 'eos_token_id', 'pad_token_id', '_name_or_path', 'attention_dropout',
        'hidden_dropout', 'residual_dropout', 'embedding_dropout', 'classifier_dropout'}


def form_of(c):
    """The form of a model with the config c. Raises ValueError, with the settings that would make
    one fit, where none computes the same."""
    is_normed, form, wrong = getattr(c, 'latent_norm', False), 'gpt2', []
    if c.rotary == 'decoupled' or is_normed:
        form = 'deepseek_v3'
        wrong += [] if c.rotary == 'decoupled' else ["rotary='decoupled'"]
        wrong += [] if is_normed else ['latent_norm=True']
        wrong += [] if isinstance(c.n_latent, int) else ['one n_latent for all layers']
    elif c.mlp == 'gated':
        form, wrong = 'llama', [] if c.rotary == 'all' else ["rotary='all'"]
    elif c.rotary == 'all':
        form = 'gpt_neox' if is_ungrouped(c) else 'starcoder2'
    if form in HAS_RMS_NORM:
        wrong += ['bias=False'] if c.bias else []
        wrong += ["mlp='gated' or mlp=False"] if c.mlp is True else []
    if wrong:
        raise ValueError(f'transformers has no class that computes this model: {ARTICLES[form]} '
                         f"would, with {', '.join(wrong)}")
    return form


def is_ungrouped(c):
    return c.n_kv_head in (None, c.n_head)


@torch.no_grad()
def trunk(model, form):
    """The GPT or, for deepseek_v3, the GPT_MLA that computes what the trunk of model does. Where a
    form has no such attention it becomes MHA, with the weights of head_weights() in float64, and
    for biases what heads() makes of 0."""
    c, model_class = model.config, GPT_MLA if form == 'deepseek_v3' else GPT
    settings = {f.name: getattr(c, f.name) for f in fields(model_class.config_class)}
    state = {name: p for name, p in model.state_dict().items() if not name.startswith('ahead.')}
    is_plain = hasattr(model.transformer.h[0].attn, 'c_attn') and (
        is_ungrouped(c) or form in ('starcoder2', 'llama'))
    if form == 'deepseek_v3' or is_plain:
        return model_class.from_state_dict(model_class.config_class(**settings), state)
    state = {name: p for name, p in state.items() if '.attn.' not in name or '.c_proj.' in name}
    for i, block in enumerate(model.transformer.h):
        attn, name = deepcopy(block.attn).double(), f'transformer.h.{i}.attn.c_attn'
        W = torch.cat(attn.head_weights()[:3])  # (3 n_head, n_embd, head_dim)
        state[f'{name}.weight'] = W.mT.flatten(0, 1)  # (3 n_embd, n_embd)
        if c.bias:
            parts = attn.heads(W.new_zeros(1, 1, c.n_embd))
            state[f'{name}.bias'] = torch.cat([part.flatten() for part in parts])
    return GPT.from_state_dict(GPT.config_class(**settings | {'n_kv_head': None}), state)


def their_config(c, form, n_vocab, end=None):
    """transformers' config of a form, for a trunk with the config c whose vocabulary is cut to
    n_vocab."""
    import transformers
    config_class = getattr(transformers, f'{CLASSES[form]}Config')
    shared = dict(vocab_size=n_vocab, bos_token_id=end, eos_token_id=end)
    if form == 'gpt2':
        return config_class(
            n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            n_inner=None if c.mlp else 1, resid_pdrop=c.dropout, embd_pdrop=c.dropout,
            attn_pdrop=c.dropout, activation_function=GELUS[c.gelu], **shared)
    width = {True: 4 * c.n_embd, 'gated': 8 * c.n_embd // 3, False: 1}[c.mlp]
    rope = dict(rope_type='default', rope_theta=c.rotary_base)
    shared |= dict(hidden_size=c.n_embd, num_hidden_layers=c.n_layer, intermediate_size=width,
                   num_attention_heads=c.n_head, max_position_embeddings=c.block_size,
                   attention_dropout=c.dropout, rope_parameters=rope,
                   tie_word_embeddings=form not in HAS_RMS_NORM)
    if form == 'gpt_neox':
        rope['partial_rotary_factor'] = 1.0
        return config_class(hidden_act=GELUS[c.gelu], hidden_dropout=c.dropout,
                            use_parallel_residual=False, layer_norm_eps=1e-5, **shared)
    shared['num_key_value_heads'] = c.n_kv_head or c.n_head
    if form == 'starcoder2':
        return config_class(hidden_act=GELUS[c.gelu], residual_dropout=c.dropout,
                            embedding_dropout=c.dropout, norm_epsilon=1e-5, sliding_window=None,
                            **shared)
    if form == 'llama':
        return config_class(rms_norm_eps=1e-5, head_dim=c.head_dim, pretraining_tp=1, **shared)
    return config_class(
        rms_norm_eps=1e-5, kv_lora_rank=c.n_latent, q_lora_rank=c.n_query_latent,
        qk_rope_head_dim=c.n_rotary, qk_nope_head_dim=c.head_dim, v_head_dim=c.head_dim,
        first_k_dense_replace=c.n_layer, num_nextn_predict_layers=0, rope_interleave=False,
        **shared)


def centred(W):
    """The weight (n_out, n_in) of a linear map whose outputs have the mean 0."""
    return W - W.mean(0, dtype=torch.float64)


def their_state(gpt, form, n_vocab):
    """The weights of a trunk under their names."""
    c, state = gpt.config, gpt.state_dict()
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        state[name] = state[name][:n_vocab]
    for prefix in [f'transformer.h.{i}.' for i in range(c.n_layer)] if not c.mlp else []:
        state |= {f'{prefix}ln_2.weight': torch.ones(c.n_embd),
                  f'{prefix}mlp.c_fc.weight': torch.zeros(1, c.n_embd),
                  f'{prefix}mlp.c_gate.weight': torch.zeros(1, c.n_embd),
                  f'{prefix}mlp.c_proj.weight': torch.zeros(c.n_embd, 1)}
    if form in HAS_RMS_NORM:
        state['transformer.wte.weight'] = centred(state['transformer.wte.weight'].T).T
        state |= {name: centred(W) for name, W in state.items() if name.endswith('c_proj.weight')}
    if form == 'gpt2':
        return {name: W.T if name.endswith(TRANSPOSED) else W for name, W in state.items()}
    for i, block in enumerate(gpt.transformer.h):
        prefix = f'transformer.h.{i}.attn.'
        own = {name: state.pop(prefix + name) for name in block.attn.state_dict()}
        state |= {prefix + name: W for name, W in their_attention(block.attn, own, form).items()}
    for our, their in NAMES[form].items():
        state = {name.replace(our, their): W for name, W in state.items()}
    return state


def their_attention(attn, own, form):
    """The weights and biases, own, of an attention, as a form other than gpt2 has them. The names
    of those that no other form has stay ours."""
    H, new = attn.n_head, {}
    if form == 'deepseek_v3':
        parts = [own[f'{part}.weight'].unflatten(0, (H, -1)) for part in ('key', 'value')]
        kv_b = attn.scaled(torch.cat(parts, dim=1).flatten(0, 1))  # each head's key, then its value
        new |= {'latent_enc.weight': own['latent_enc.weight'], 'kv_b_proj.weight': kv_b,
                'kv_a_layernorm.weight': torch.ones(attn.n_latent)}
        if attn.query_enc:
            W = attn.scaled(own['query.weight'])
            new |= {'query_enc.weight': own['query_enc.weight'], 'q_b_proj.weight': W,
                    'q_a_layernorm.weight': torch.ones(W.size(1))}
        else:
            new['q_proj.weight'] = own['query.weight']
    for end in ('weight', 'bias'):
        if f'c_proj.{end}' in own:
            new[f'c_proj.{end}'] = own[f'c_proj.{end}']
        packed = own.get(f'c_attn.{end}')
        if packed is not None and form == 'gpt_neox':  # head by head
            new[f'c_attn.{end}'] = packed.unflatten(0, (3, H, -1)).transpose(0, 1).flatten(0, 2)
        elif packed is not None:
            sizes = [n * (len(packed) // (H + 2 * attn.n_kv_head))
                     for n in (H, attn.n_kv_head, attn.n_kv_head)]
            new |= {f'{part}_proj.{end}': W for part, W in zip('qkv', packed.split(sizes))}
    return new


@torch.no_grad()
def to_hugging_face(model, end=None, n_vocab=None):
    """transformers' model that computes what model does; of a k-ahead model, what its trunk does
    with the head of the next token. Biases that the model lacks are zeros. end is the id that ends
    a text, None if there is none. n_vocab cuts off the ids with which a vocabulary was padded.
    Raises ValueError where no class of transformers computes the same."""
    from transformers import AutoModelForCausalLM
    form = form_of(model.config)
    gpt = trunk(model, form)
    n_vocab = n_vocab or gpt.config.vocab_size
    state = their_state(gpt, form, n_vocab)
    hf = AutoModelForCausalLM.from_config(their_config(gpt.config, form, n_vocab, end)).eval()
    for name, p in hf.named_parameters():
        if name not in state and not name.endswith('.bias'):
            raise KeyError(f'{name} of {form} has no counterpart')
        p.copy_(state.get(name, torch.zeros(())))
    return hf


def our_config(c):
    """The config, a GPTConfig or an MLAConfig, of what transformers' config c describes. Raises
    ValueError for what our models do not compute."""
    if c.model_type not in CLASSES:
        raise ValueError(f'it holds a model of type {c.model_type!r}, not one of '
                         f"{', '.join(CLASSES)}")
    if c.model_type == 'gpt2':
        other_attention = c.scale_attn_by_inverse_layer_idx or not c.scale_attn_weights
        other_mlp = (c.activation_function not in OUR_GELUS
                     or c.n_inner not in (None, 4 * c.n_embd, 1))
        other_norm = not c.tie_word_embeddings or c.layer_norm_epsilon != 1e-5
        if other_attention or other_mlp or other_norm:
            raise ValueError('it is a variant of GPT-2 that model.py does not compute: it needs a '
                             'GELU, layer norms with epsilon 1e-5, an MLP 4 times as wide, tied '
                             'embeddings and attention scaled by head_dim alone')
        return GPT.config_class(
            block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
            n_embd=c.n_embd, bias=True, gelu=OUR_GELUS[c.activation_function], mlp=c.n_inner != 1)
    has_rms_norm = c.model_type in HAS_RMS_NORM
    settings = dict(
        block_size=c.max_position_embeddings, vocab_size=c.vocab_size, n_embd=c.hidden_size,
        n_layer=c.num_hidden_layers, n_head=c.num_attention_heads, bias=not has_rms_norm,
        gelu=OUR_GELUS.get(c.hidden_act, 'none'), rotary='all',
        rotary_base=c.rope_parameters.get('rope_theta', 0.0),
        mlp=c.intermediate_size != 1 and ('gated' if has_rms_norm else True))
    if c.model_type == 'deepseek_v3':
        config = GPT_MLA.config_class(**settings | dict(
            rotary='decoupled', n_latent=c.kv_lora_rank, n_rotary=c.qk_rope_head_dim,
            n_query_latent=c.q_lora_rank, latent_norm=True))
    else:
        config = GPT.config_class(**settings | dict(
            n_kv_head=getattr(c, 'num_key_value_heads', None)))
    # what our config makes of it has to be what it was
    wanted = their_config(config, c.model_type, c.vocab_size).to_dict()
    for key in sorted(wanted.keys() - FREE):
        found = c.to_dict().get(key)
        if key == 'hidden_act' and found in OUR_GELUS:  # which has several names
            found = GELUS[OUR_GELUS[found]]
        if found != wanted[key]:
            raise ValueError(f'it is a variant of {CLASSES[c.model_type]} that our models do not '
                             f'compute: {key} is {found!r}, and it would have to be '
                             f'{wanted[key]!r}')
    return config


def our_state(state, config, form):
    """Our names of the weights of a form, state. Raises ValueError where an RMS norm does not do
    what our layer norm does."""
    for our, their in reversed(NAMES[form].items()):
        state = {name.replace(their, our): W for name, W in state.items()}
    if form == 'gpt2':
        state = {name: W.T.contiguous() if name.endswith(TRANSPOSED) else W
                 for name, W in state.items() if not name.endswith(MASKS)}
    else:
        state = {name: W for name, W in state.items() if not name.endswith('rotary_emb.inv_freq')}
    if form in HAS_RMS_NORM:
        written = [state['transformer.wte.weight'].T]
        written += [W for name, W in state.items() if name.endswith('c_proj.weight')]
        same = centred(state['lm_head.weight'].T) - written[0]
        if max(W.mean(0).abs().max() for W in written) > 1e-4 or same.abs().max() > 1e-4:
            raise ValueError('its RMS norms are no layer norms: what is written to its residual '
                             'stream is not centred, as export_huggingface.py writes it')
        state['transformer.wte.weight'] = state['lm_head.weight']
    if not config.mlp:
        state = {name: W for name, W in state.items()
                 if '.mlp.' not in name and '.ln_2.' not in name}
    for prefix in [f'transformer.h.{i}.attn.' for i in range(config.n_layer)]:
        own = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
        own = our_attention({name.removeprefix(prefix): W for name, W in own.items()}, config, form)
        state |= {prefix + name: W for name, W in own.items()}
    return state


def our_attention(own, c, form):
    """The weights and biases, own, of an attention of a form, as ours has them."""
    H = c.n_head
    if form == 'deepseek_v3':
        gain = own.pop('kv_a_layernorm.weight')
        kv_b = own.pop('kv_b_proj.weight').unflatten(0, (H, 2, -1)) * gain
        own['key.weight'], own['value.weight'] = (kv_b[:, i].flatten(0, 1) for i in range(2))
        if c.n_query_latent:
            own['query.weight'] = own.pop('q_b_proj.weight') * own.pop('q_a_layernorm.weight')
        else:
            own['query.weight'] = own.pop('q_proj.weight')
    for end in ('weight', 'bias'):
        if form == 'gpt_neox' and f'c_attn.{end}' in own:
            packed = own[f'c_attn.{end}'].unflatten(0, (H, 3, -1))
            own[f'c_attn.{end}'] = packed.transpose(0, 1).flatten(0, 2)
        elif form in ('starcoder2', 'llama') and f'k_proj.{end}' in own:
            own[f'c_attn.{end}'] = torch.cat([own.pop(f'{part}_proj.{end}') for part in 'qkv'])
    return own


def read_config(source):
    """The config, of transformers' and of ours, of the model at source. Raises ValueError for what
    our models do not compute, OSError where it cannot be read."""
    import huggingface_hub
    from transformers import AutoConfig
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    c = read_stored(AutoConfig.from_pretrained, source)
    return c, our_config(c)


def model_class_of(source):
    """GPT or GPT_MLA: which of them computes the model at source. As read_config."""
    if not Path(source).is_dir():  # 'gpt2' and its larger kin, which a download would tell
        return GPT
    return GPT_MLA if isinstance(read_config(source)[1], GPT_MLA.config_class) else GPT


def from_hugging_face(model_class, source, override_args=None):
    """A GPT or GPT_MLA with the weights that a class of transformers' has. source is 'gpt2',
    'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a directory that save_pretrained wrote, such as
    export_huggingface.py does. override_args may hold a dropout.

    Raises ValueError for a model_class whose attention those weights do not fit and for what our
    models do not compute, OSError where they cannot be read.
    """
    from transformers import AutoModelForCausalLM
    found = model_class_of(source)
    if model_class is not found:
        remedy = ('train_mla.py takes them' if found is GPT_MLA else
                  'train.py takes them, convert_mla.py makes an MLA model of them')
        attention = 'multi-latent' if found is GPT_MLA else 'multi-head'
        raise ValueError(f'{source} has the weights of a {found.__name__} with {attention} '
                         f'attention, which is no {model_class.__name__}: {remedy}')
    theirs, config = read_config(source)
    hf, report = read_stored(
        AutoModelForCausalLM.from_pretrained, source, config=theirs, dtype=torch.float32,
        output_loading_info=True, ignore_mismatched_sizes=True)
    for problem in ('missing', 'unexpected', 'mismatched'):
        keys = sorted(map(str, report[f'{problem}_keys']))
        names = [key for key in keys if not key.endswith(MASKS)]
        if names:
            raise ValueError(f'{source} has weights that do not fit its config.json: {problem} '
                             f'{names[0]}')
    for key, value in (override_args or {}).items():
        setattr(config, key, value)
    state = our_state(hf.state_dict(), config, theirs.model_type)
    return model_class.from_state_dict(config, state)


def read_stored(load, source, **settings):
    """load(source), from the network only where it is not on the disk, or not all of it."""
    try:
        return load(source, local_files_only=True, **settings)
    except OSError:
        return load(source, **settings)

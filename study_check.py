"""
Recompute three figures of each cell of the study by other means: from the tensors of its
checkpoint, in numpy and float64, one sequence and one head after the other.

    python study_check.py out_study

The figures are the copy accuracy, the attention of the best head to its shift, and the copy
accuracy with the named heads at their means. The sequences are those of induction_circuit.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from configurator import UserError, configure, run

import numpy as np
import torch
from scipy.special import erf

from analysis.induction_circuit import Config as CircuitConfig
from analysis.induction_heads import copies_with_lags
from runtime.progress import progress_bar

TOLERANCE = {'accuracy': 2e-3, 'score': 1e-4, 'without_named': 2e-3}  # a tie may fall otherwise


@dataclass
class CheckConfig:
    out_dir: str = 'out_study'  # of study.py


def layer_norm(x, gain):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5) * gain


def turned(x, base):
    """x (T, n) with each pair of numbers i, i + n / 2 turned by place / base^(2 i / n)."""
    T, n = x.shape
    angle = np.arange(T)[:, None] / base ** (2 * np.arange(n // 2) / n)
    a, b = x[:, :n // 2], x[:, n // 2:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle),
                           b * np.cos(angle) + a * np.sin(angle)), axis=1)


def latent_of(latent, c):
    """A latent (T, width) as its readers get it."""
    if getattr(c, 'latent_norm', False):
        latent = latent / np.sqrt((latent ** 2).mean(-1, keepdims=True) + 1e-6)
    scales = getattr(c, 'latent_scale', False)
    return latent * math.sqrt(c.n_embd / latent.shape[1]) if scales else latent


def head_inputs(own, c, x, head):
    """The query, key and value (T, width) of one head, for x (T, n_embd)."""
    d = c.n_embd // c.n_head
    if 'c_attn.weight' in own:
        n_kv = c.n_kv_head or c.n_head
        group, W = head * n_kv // c.n_head, own['c_attn.weight']
        starts = head * d, c.n_embd + group * d, c.n_embd + (n_kv + group) * d
        q, k, v = (x @ W[start:start + d].T for start in starts)
    else:
        latent = x @ own['latent_enc.weight'].T
        content, r = latent_of(latent[:, :c.n_latent], c), latent[:, c.n_latent:]
        k, v = (content @ own[f'{part}.weight'][head * d:(head + 1) * d].T
                for part in ('key', 'value'))
        width = d + r.shape[1]
        if 'query_enc.weight' in own:
            x = latent_of(x @ own['query_enc.weight'].T, c)
        q = x @ own['query.weight'][head * width:(head + 1) * width].T
        if r.shape[1]:
            q = np.concatenate((q[:, :d], turned(q[:, d:], c.rotary_base)), axis=1)
            k = np.concatenate((k, turned(r, c.rotary_base)), axis=1)
    if c.rotary == 'all':
        q, k = turned(q, c.rotary_base), turned(k, c.rotary_base)
    return q, k, v


def forward(weights, c, ids, held=None):
    """The logits (T, vocab_size), the patterns and the heads' outputs, dictionaries by (layer,
    head), for one sequence of ids. held has outputs to take the place of some heads'."""
    T, d, patterns, outputs = len(ids), c.n_embd // c.n_head, {}, {}
    x = weights['transformer.wte.weight'][ids]
    if 'transformer.wpe.weight' in weights:
        x = x + weights['transformer.wpe.weight'][:T]
    for layer in range(c.n_layer):
        prefix = f'transformer.h.{layer}.'
        own = {name.removeprefix(f'{prefix}attn.'): W for name, W in weights.items()
               if name.startswith(f'{prefix}attn.')}
        read, out = layer_norm(x, weights[f'{prefix}ln_1.weight']), np.zeros_like(x)
        for head in range(c.n_head):
            q, k, v = head_inputs(own, c, read, head)
            scores = q @ k.T / math.sqrt(q.shape[1])
            scores[np.triu_indices(T, 1)] = -np.inf
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            patterns[layer, head], outputs[layer, head] = p, p @ v
            z = outputs[layer, head] if held is None else held.get((layer, head), p @ v)
            out += np.broadcast_to(z, (T, d)) @ own['c_proj.weight'][:, head * d:(head + 1) * d].T
        x = x + out
        if f'{prefix}mlp.c_fc.weight' in weights:
            h = layer_norm(x, weights[f'{prefix}ln_2.weight']) @ weights[
                f'{prefix}mlp.c_fc.weight'].T
            x = x + (h * (1 + erf(h / math.sqrt(2))) / 2) @ weights[f'{prefix}mlp.c_proj.weight'].T
    logits = layer_norm(x, weights['transformer.ln_f.weight']) @ weights['lm_head.weight'].T
    return logits, patterns, outputs


def figures(weights, c, circuit, sequences):
    """The three figures, as induction_circuit has them: a dictionary. circuit is what a cell's JSON
    has of it."""
    copies = copies_with_lags(SimpleNamespace(config=c), c.vocab_size, sequences,
                              CircuitConfig().seed)
    rows = list(zip(copies.idx.numpy(), copies.first.tolist(), copies.lag.tolist()))
    names = {name for key in ('readers', 'key_carriers', 'value_carriers', 'query_carriers')
             for name in circuit[key]}
    named = [tuple(map(int, name.split('.'))) for name in names]
    runs = [forward(weights, c, ids) for ids, *_ in rows]
    means = {head: np.mean([outputs[head].mean(0) for *_, outputs in runs], 0) for head in named}

    def accuracy(all_logits):
        right = [logits[first + lag + i].argmax() == ids[first + i + 1]
                 for logits, (ids, first, lag) in zip(all_logits, rows)
                 for i in range(copies.length - 1)]
        return float(np.mean(right))
    attention = {head: np.mean([patterns[head][first + lag + i, first + i + circuit['shift']]
                                for (_, patterns, _), (_, first, lag) in zip(runs, rows)
                                for i in range(copies.length)]) for head in runs[0][1]
                 if head[0] > 0}
    found = {'accuracy': accuracy([logits for logits, *_ in runs]),
             'score': float(max(attention.values()))}
    if named:
        found['without_named'] = accuracy([forward(weights, c, ids, means)[0] for ids, *_ in rows])
    return found


def read_weights(path):
    """The tensors of a checkpoint in float64, and its model settings. Raises UserError for what
    the study does not have."""
    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    settings = dict(n_kv_head=None, rotary='none', rotary_base=10000.0, mlp=True)
    c = SimpleNamespace(**settings | checkpoint['model_args'])
    if c.bias or c.mlp == 'gated':
        raise UserError(f'{path} has bias={c.bias}, mlp={c.mlp!r}, which no cell of the study has: '
                        'give a folder of study.py')
    return {name: W.double().numpy() for name, W in checkpoint['model'].items()}, c


def main():
    config, _ = configure(sys.argv[1:], CheckConfig, positional=('out_dir',))
    out_dir, wrong, checked = Path(config.out_dir), [], 0
    cells = [path for path in sorted((out_dir / 'cells').glob('*.json'))
             if list((out_dir / 'runs' / path.stem).glob('ckpt*.pt'))]
    if not cells:
        raise UserError(f'out_dir={out_dir} has no cells with checkpoints: run python study.py '
                        f'--out_dir={out_dir} first')
    for path in progress_bar(cells, 'cells'):
        checkpoint, = (out_dir / 'runs' / path.stem).glob('ckpt*.pt')
        circuit = json.loads(path.read_text())['circuit']
        found = figures(*read_weights(checkpoint), circuit, CircuitConfig().sequences)
        for key, value in found.items():
            checked += 1
            if not abs(value - circuit[key]) <= TOLERANCE[key]:
                wrong.append(f'{path.stem}: {key} is {circuit[key]}, and {value:.6f} by loops')
    print('\n'.join([*wrong, f'{checked - len(wrong)} of {checked} figures of {len(cells)} cells '
                             'agree']))
    sys.exit(1 if wrong else 0)


if __name__ == '__main__':
    run(main)

"""
Which parts of the model push a token: the direct path from each head, MLP and embedding.

    python -m analysis.attribution gpt2 --prompt="When Mary and John met, John spoke to" \
        --answer=" Mary" --against=" John"

It needs a model and a prompt; without one it takes how the val split of the model's data begins.
The logit of the answer less that of another token is a sum over the parts that wrote to the
residual stream, each through the final norm at its actual scale (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits", section "Logit attribution"). Without another
token it is less the mean logit of all tokens. The parts add up to the difference. A part of the
prompt, such as a word for a model that reads letters, is all of its tokens where they stand.

A direct path leaves out what a part does through later ones. A head that feeds another may have
nothing here and yet be needed: `patching` and `ablation` ask that.
"""

from dataclasses import dataclass

from configurator import UserError, run

import numpy as np
import torch

from analysis.plots import Panel, draw_panels, symmetric
from analysis.program import AnalysisConfig, main, top_heads
from analysis.record import Taps, record
from sample import encode

# activations that are sums of what parts write, or come after the last of them
SUMS = ('resid_pre', 'attn.result', 'attn_out', 'resid_mid', 'resid_post', 'ln_final.out',
        'logits')


@dataclass
class Config(AnalysisConfig):
    prompt: str = ''  # a text or FILE:prompt.txt; '': how the val split of the model's data begins
    answer: str = ''  # a token, or a part of the prompt; '': the likeliest token
    against: str = ''  # as many tokens, whose logits are subtracted; '': the mean over all tokens
    position: int = -1  # after which token of the prompt the answer is, from 0; -1: the last
    top: int = 8  # heads in the table
    least = dict(top=1)


@dataclass
class Parts:
    """The parts of a difference of logits, of B prompts, in float64."""
    heads: torch.Tensor  # (n_layer, n_head, B)
    mlps: torch.Tensor  # (n_layer, B)
    embedding: torch.Tensor  # (B,) of the token itself
    positions: torch.Tensor  # (B,) of its learned position, 0 where there is none
    biases: torch.Tensor  # (B,) of all outputs of attention, and of the final norm
    total: torch.Tensor  # (B,) the sum, which is the difference


@dataclass
class Attribution:
    tokens: list  # texts of the prompt's tokens
    places: list  # after which the tokens of the answer are predicted
    answer: str
    against: str  # 'the mean' where there was none
    difference: float  # logit of the answer less the other, nats
    heads: np.ndarray  # (n_layer, n_head) part of each head, nats
    mlps: np.ndarray  # (n_layer,)
    embedding: float
    positions: float
    biases: float
    top: int = 8


@torch.no_grad()
def attribute(model, idx, end, direction, edits=None):
    """The Parts of a difference of logits after the positions end (B,) of prompts idx (B, T).
    direction (B, n_embd) is the difference of the two rows of the unembedding. edits are those of
    Taps. A head's share of the value bias is its own."""
    rows, ln_f = torch.arange(len(idx), device=idx.device), model.transformer.ln_f
    taps = Taps(edits or {}, frozenset(['embed', 'pos_embed']))
    by_head, by_mlp, biases = [], [], torch.zeros_like(direction, dtype=torch.float64)
    for block in record(model, idx, taps):
        attn = model.transformer.h[block.layer].attn
        W_O = attn.head_weights()[-1]  # (n_head, head_dim, n_embd)
        z = block.z.transpose(1, 2)[rows, end]  # (B, n_head, head_dim)
        by_head.append(torch.einsum('bhd,hdn->hbn', z.double(), W_O.double()))
        by_mlp.append(block.mlp_out[rows, end].double())
        if attn.c_proj.bias is not None:
            biases = biases + attn.c_proj.bias.double()
    x = block.after[rows, end].double()
    embedding = taps.found['embed'][rows, end].double()
    positions = torch.zeros_like(embedding)
    if 'pos_embed' in taps.found:
        positions = taps.found['pos_embed'].expand(len(idx), -1, -1)[rows, end].double()
    std = (x.var(-1, correction=0) + 1e-5).sqrt()  # (B,)
    direction = direction.double()
    reads = direction * ln_f.weight.double()
    reads = (reads - reads.mean(-1, keepdim=True)) / std[:, None]  # the norm subtracts the mean
    bias = 0.0 if ln_f.bias is None else (direction * ln_f.bias.double()).sum(-1)

    def read(part):
        return (part * reads).sum(-1)
    return Parts(read(torch.stack(by_head)), read(torch.stack(by_mlp)), read(embedding),
                 read(positions), read(biases) + bias, read(x) + bias)


def check_position(position, T):
    if not -T <= position < T:
        raise UserError(f'position={position} is not there: the prompt has {T} tokens')


def find_answer(run, token, position, sequence):
    """The ids of the answer, a text or an id, and after which places they are predicted: after
    position, or where a text of several tokens comes last in the prompt. Raises UserError."""
    ids = [token] if isinstance(token, int) else encode(run.subject.tokenizer, 'answer', token)
    T, n = run.idx.size(1), len(ids)
    if n == 1:
        check_position(position, T)
        return ids, [position % T]
    row = run.idx[sequence].tolist()
    starts = [i for i in range(1, T - n + 1) if row[i:i + n] == ids]
    if not n or not starts:
        raise UserError(f'answer={token!r} is {n} tokens, which do not stand in the prompt one '
                        'after another: give a single token, or a part of the prompt')
    return ids, list(range(starts[-1] - 1, starts[-1] + n - 1))


def attribute_run(run, token, against='', position=-1, sequence=0):
    """The Attribution of a token, a text or an id, after a position of a sequence of a Run. A text
    of several tokens has to stand in the prompt: then it is that of all of them there, summed. The
    Run may edit what parts write, and nothing between them. Raises UserError."""
    subject = run.subject
    W_U, n_vocab = subject.model.lm_head.weight.detach(), subject.n_vocab
    between = [name for name in run.edits if name.endswith(SUMS)]
    if between:
        raise UserError(f'attribution adds up what parts write, and {between[0]} is edited behind '
                        'them: edit attn.z, mlp_out or what is before')
    ids, places = find_answer(run, token, position, sequence)
    others = [against] if isinstance(against, int) else (
        encode(subject.tokenizer, 'against', against) if against else [])
    if others and len(others) != len(ids):
        raise UserError(f'against={against!r} is {len(others)} tokens and answer={token!r} '
                        f'{len(ids)}: give as many')
    subtracted = W_U[others] if others else W_U[:n_vocab].mean(0).expand(len(ids), -1)
    total = 0
    for place, direction in zip(places, W_U[ids] - subtracted):
        # of all sequences: edits are those of the whole run
        end = torch.full((len(run.idx),), place, device=run.idx.device)
        parts = attribute(subject.model, run.idx, end, direction.expand(len(end), -1), run.edits)
        numbers = [parts.total, parts.embedding, parts.positions, parts.biases]
        total = total + torch.cat([torch.stack(numbers)[:, sequence],
                                   parts.heads[..., sequence].flatten(),
                                   parts.mlps[:, sequence]])
    (difference, embedding, positions, biases), heads, mlps = (
        part.cpu().numpy() for part in total.split((4, parts.heads[..., 0].numel(),
                                                    len(parts.mlps))))

    def text(tokens):
        return ''.join(map(run.label, tokens))
    return Attribution(
        run.labels(sequence), places, text(ids), text(others) or 'the mean', float(difference),
        heads.reshape(parts.heads.shape[:2]), mlps, float(embedding), float(positions),
        float(biases))


def analyse(subject, config):
    run = subject.run(subject.prompt(config.prompt))
    check_position(config.position, run.idx.size(1))
    likeliest = int(run.logits[0, config.position, :subject.n_vocab].argmax())
    result = attribute_run(run, config.answer or likeliest, config.against, config.position)
    result.top = config.top
    return result


def table(result):
    first = result.places[0]
    summed = f', {len(result.places)} tokens together' if len(result.places) > 1 else ''
    lines = [f'logit of {result.answer} less {result.against} after token {first}, '
             f'{result.tokens[first]}{summed}: {result.difference:+.3f} nats', '']
    for layer, head in top_heads(abs(result.heads), result.top):
        lines.append(f'{f"head {layer}.{head}":>12}{result.heads[layer, head]:>+9.3f}')
    for layer, part in enumerate(result.mlps):
        lines.append(f'{f"MLP {layer}":>12}{part:>+9.3f}')
    lines += [f'{"embedding":>12}{result.embedding:>+9.3f}',
              f'{"position":>12}{result.positions:>+9.3f}',
              f'{"biases":>12}{result.biases:>+9.3f}',
              f'{"all heads":>12}{result.heads.sum():>+9.3f}     {result.heads.size} of them']
    return '\n'.join(lines)


def plot(results):
    heads = {name: result.heads for name, result in results.items()}
    rest = {name: np.concatenate([[result.embedding, result.positions], result.mlps,
                                  [result.biases]])[:, None] for name, result in results.items()}
    end = max(symmetric(heads), symmetric(rest))
    names = {name: (['embedding', 'position', *(f'MLP {i}' for i in range(len(result.mlps))),
                     'biases'], ['']) for name, result in results.items()}
    title = '\n'.join(f'{name}: {result.answer} less {result.against}, {result.difference:+.2f} '
                      f'nats' for name, result in results.items())
    return draw_panels(f'Direct logit attribution\n{title}', [
        Panel('heads', heads, 'nats', -end, end, 'RdBu_r'),
        Panel('the other parts', rest, 'nats', -end, end, 'RdBu_r', 'part', '', names=names)])


if __name__ == '__main__':
    run(lambda: main('attribution', Config, analyse, table, plot))

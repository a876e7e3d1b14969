"""
Do heads copy what they read?

The full OV circuit of a head, W_E W_V W_O W_U, says how reading one token changes the logit of each (Elhage et al. 2021,
"Detecting Copying Heads"). Its eigenvalues l tell copying, which makes the token read more likely, from its opposite:
sum(l) / sum(|l|) is 1 for a head that copies everything and -1 for one that negates. As a product of maps through a narrow
head it has at most head_dim eigenvalues other than 0: those of the small matrix (W_O W_U)(W_E W_V).

The top-5 score, after Wang et al. 2023, section 3.1, reads a name as it is behind the first MLP (in layer 0: its embedding),
puts it through the head alone and the final norm, and counts how often the name is among the five likeliest tokens; with the
head's sign turned, it counts how often the head suppresses it. Where they take the names from prompts, here each stands alone:
without a position, without what attention adds in the first block, and without biases. A character model has no names: there
every character is tried.

The two need not agree: the eigenvalues are of all tokens' bare embeddings, weighed by their length.
"""

from dataclasses import dataclass

import numpy as np
import torch

from analysis.circuits import folded_embedding, folded_heads, folded_unembedding, token_vectors
from analysis.ioi import single_token_names
from analysis.plots import Panel, draw_panels
from analysis.program import AnalysisConfig, main, progress, top_heads
from configurator import run


@dataclass
class Config(AnalysisConfig):
    pass


@dataclass
class Copying:
    eigenvalue_score: np.ndarray  # (n_layer, n_head) sum(l) / sum(|l|), -1 to 1
    top5: np.ndarray  # (n_layer, n_head) share of names that the head puts among the five likeliest tokens
    bottom5: np.ndarray  # the same for the head with its sign turned
    n_names: int
    n_vocab: int


def eigenvalue_score(W_V, W_O, UE):
    """sum(l) / sum(|l|) over the eigenvalues l of W_E W_V W_O W_U, for W_V (n_embd, head_dim), W_O (head_dim, n_embd) and
    UE = W_U W_E (n_embd, n_embd), which is the same for all heads."""
    eigenvalues = torch.linalg.eigvals(W_O @ UE @ W_V)
    total = eigenvalues.abs().sum()
    return (eigenvalues.sum().real / total).item() if total > 0 else 0.0


@torch.no_grad()
def top5_scores(model, names, vectors, W_V, W_O, n_vocab):
    """Of one head: the share of the token ids names, which it reads as vectors (names, n_embd), that it puts among the five
    likeliest of n_vocab, and the share with its sign turned."""
    written = (vectors @ W_V @ W_O).to(model.lm_head.weight)  # (names, n_embd)
    shares = []
    for sign in (1, -1):
        top = model.unembed(sign * written)[:, :n_vocab].topk(min(5, n_vocab)).indices
        shares.append((top == names[:, None]).any(-1).double().mean().item())
    return shares


@torch.no_grad()
def analyse(subject, config):
    model, n_vocab = subject.model, subject.n_vocab
    heads = folded_heads(model)
    UE = folded_unembedding(model, n_vocab) @ folded_embedding(model, n_vocab)
    names = torch.tensor(single_token_names(subject.tokenizer) if subject.spec == 'gpt2' else range(n_vocab),
                         device=subject.device)
    bare, behind_mlp = (token_vectors(model, names, first_mlp) for first_mlp in (False, True))
    shape = model.config.n_layer, model.config.n_head
    score, top5, bottom5 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for place in progress(list(np.ndindex(shape)), 'copying'):
        W_V, W_O = heads.W_V[place], heads.W_O[place]
        score[place] = eigenvalue_score(W_V, W_O, UE)
        vectors = behind_mlp if place[0] else bare
        top5[place], bottom5[place] = top5_scores(model, names, vectors, W_V, W_O, n_vocab)
    return Copying(score, top5, bottom5, len(names), n_vocab)


def table(result):
    lines = [f'{"head":>6}{"eigenvalues":>14}{"top 5":>9}{"bottom 5":>11}      the most and the least copying heads']
    order = top_heads(result.eigenvalue_score)
    shown = order if len(order) <= 12 else order[:6] + order[-6:]
    lines += [f'{f"{layer}.{head}":>6}{result.eigenvalue_score[layer, head]:>14.2f}{result.top5[layer, head]:>9.0%}'
              f'{result.bottom5[layer, head]:>11.0%}' for layer, head in shown]
    return '\n'.join(lines + [f'top 5: of {result.n_names} names or characters; chance is {5 / result.n_vocab:.1%}'])


def plot(results):
    def maps(field):
        return {name: getattr(result, field) for name, result in results.items()}
    return draw_panels('Do heads copy what they read?', [
        Panel('eigenvalues of the OV circuit: 1 copies, -1 negates', maps('eigenvalue_score'), 'sum(l) / sum(|l|)', -1, 1,
              'RdBu_r'),
        Panel('the token read is among the 5 likeliest', maps('top5'), 'share of tokens', 0, 1),
        Panel('and among the 5 unlikeliest', maps('bottom5'), 'share of tokens', 0, 1)])


if __name__ == '__main__':
    run(lambda: main('copying', Config, analyse, table, plot))

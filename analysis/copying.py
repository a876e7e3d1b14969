"""
Do heads copy what they read?

    python -m analysis.copying out/ckpt.pt

It needs a model and no text. The full OV circuit of a head, W_E W_V W_O W_U, says how reading one
token changes the logit of each token (Elhage et al. 2021, "Detecting Copying Heads"). Let l be its
eigenvalues. sum(l) / sum(|l|) is 1 for a head that makes every token that it reads more likely,
and -1 for a head that makes it less likely. At most head_dim eigenvalues differ from 0: those of
the small matrix (W_O W_U)(W_E W_V).

The top-5 score follows Wang et al. 2023, section 3.1. A head reads a name as it is behind the
first MLP (in layer 0: its embedding). Its output alone goes through the final norm. The score is
how often the name is then among the five likeliest tokens. With the head's sign turned, it is how
often the head suppresses the name. Wang et al. take the names from prompts. Here each name stands
alone: without a position, without the first block's attention, and without biases. A character
model has no names, so every character is tried.

The two scores need not agree: the eigenvalues are of the bare embeddings of all tokens, weighted
by their length.

Both are about values, which no position turns. A norm on MLA's latent divides each token by a
number of its own. It is left out, which the eigenvalues feel and the top-5 score does not.
"""

from dataclasses import dataclass

from configurator import run

import numpy as np
import torch

from analysis.circuits import folded_embedding, folded_heads, folded_unembedding, token_vectors
from analysis.ioi import single_token_names
from analysis.plots import Panel, draw_panels, field_maps
from analysis.program import AnalysisConfig as Config
from analysis.program import main, top_heads
from runtime.progress import progress_bar


@dataclass
class Copying:
    eigenvalue_score: np.ndarray  # (n_layer, n_head) sum(l) / sum(|l|), -1 to 1
    top5: np.ndarray  # (n_layer, n_head) share of names that the head puts among the 5 likeliest
    bottom5: np.ndarray  # the same for the head with its sign turned
    n_names: int
    n_vocab: int


def eigenvalue_score(W_V, W_O, UE):
    """sum(l) / sum(|l|) over the eigenvalues l of W_E W_V W_O W_U, for W_V (n_embd, head_dim),
    W_O (head_dim, n_embd) and UE = W_U W_E (n_embd, n_embd), which all heads share."""
    eigenvalues = torch.linalg.eigvals(W_O @ UE @ W_V)
    total = eigenvalues.abs().sum()
    return (eigenvalues.sum().real / total).item() if total > 0 else 0.0


@torch.no_grad()
def top5_scores(model, names, vectors, W_V, W_O, n_vocab):
    """Of one head, which reads the token ids names as vectors (names, n_embd): the share of them
    that it puts among the five likeliest of n_vocab, and the share with its sign turned."""
    written = (vectors @ W_V @ W_O).to(model.lm_head.weight)  # (names, n_embd)
    shares = []
    for sign in (1, -1):
        logits = model.unembed(sign * written)[:, :n_vocab]
        top = logits.topk(min(5, n_vocab)).indices
        shares.append((top == names[:, None]).any(-1).double().mean().item())
    return shares


@torch.no_grad()
def analyse(subject, config):
    model, n_vocab = subject.model, subject.n_vocab
    heads = folded_heads(model)
    UE = folded_unembedding(model, n_vocab) @ folded_embedding(model, n_vocab)
    names = range(n_vocab)
    if subject.tokenizer.spec == 'gpt2':
        names = single_token_names(subject.tokenizer)
    names = torch.tensor(names, device=subject.device)
    bare = token_vectors(model, names, first_mlp=False)
    behind_mlp = token_vectors(model, names)
    shape = model.config.n_layer, model.config.n_head
    score, top5, bottom5 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for layer, head in progress_bar(list(np.ndindex(shape)), 'copying'):
        place = layer, head
        W_V, W_O = heads.W_V[place], heads.W_O[place]
        score[place] = eigenvalue_score(W_V, W_O, UE)
        vectors = behind_mlp if layer else bare
        top5[place], bottom5[place] = top5_scores(model, names, vectors, W_V, W_O, n_vocab)
    return Copying(score, top5, bottom5, len(names), n_vocab)


def table(result):
    lines = [f'{"head":>6}{"eigenvalues":>14}{"top 5":>9}{"bottom 5":>11}      the most and the '
             'least copying heads']
    order = top_heads(result.eigenvalue_score)
    for place in order if len(order) <= 12 else order[:6] + order[-6:]:
        name = f'{place[0]}.{place[1]}'
        lines.append(f'{name:>6}{result.eigenvalue_score[place]:>14.2f}{result.top5[place]:>9.0%}'
                     f'{result.bottom5[place]:>11.0%}')
    lines.append(f'top 5: of {result.n_names} names or characters; chance is '
                 f'{5 / result.n_vocab:.1%}')
    return '\n'.join(lines)


def plot(results):
    score, top5, bottom5 = (field_maps(results, field)
                            for field in ('eigenvalue_score', 'top5', 'bottom5'))
    return draw_panels('Do heads copy what they read?', [
        Panel('eigenvalues of the OV circuit: 1 copies, -1 negates', score, 'sum(l) / sum(|l|)',
              -1, 1, 'RdBu_r'),
        Panel('the token read is among the 5 likeliest', top5, 'share of tokens', 0, 1),
        Panel('and among the 5 unlikeliest', bottom5, 'share of tokens', 0, 1)])


if __name__ == '__main__':
    run(lambda: main('copying', Config, analyse, table, plot))

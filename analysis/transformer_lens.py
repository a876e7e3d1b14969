"""
A model of TransformerLens that does the same as one of ours, with its hooks and its tools:

    from analysis import load, to_transformer_lens
    bridge = to_transformer_lens(load('out_shakespeare_quick/ckpt_mla.pt'))
    logits, cache = bridge.run_with_cache('To be, or not to be')

It needs the package transformer_lens, version 4 or later: pip install -e ".[lens]". The model goes
through the form that transformers computes (runtime/hugging_face.py): MHA as GPT-2, rotary MHA as
GPT-NeoX or Llama, DeepSeek's MLA as DeepSeek-V3 with its latents. Every other MLA is multiplied
out: its keys and values are those of the latent, and the latent itself has no hook there.
"""

import tempfile
from pathlib import Path

from configurator import UserError

from export_huggingface import write


def to_transformer_lens(subject):
    """The TransformerBridge that computes what the trunk of a Subject does. Where no tokenizer of
    transformers says what the ids mean, its text is the ids as numbers, such as '5 12 7', to be
    read with prepend_bos=False. Raises UserError where transformers has no class for the model, or
    transformer_lens is missing."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        raise UserError('to_transformer_lens needs the package transformer_lens, version 4 or '
                        'later: pip install -e ".[lens]"') from None
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / 'model'
        write(subject, folder)
        has_tokenizer = (folder / 'tokenizer.json').exists()
        tokenizer = None if has_tokenizer else numbers_tokenizer(subject.model.config.vocab_size)
        bridge = TransformerBridge.boot_transformers(str(folder), device=str(subject.device),
                                                     tokenizer=tokenizer)
    return bridge.eval()


def numbers_tokenizer(n_vocab):
    """A tokenizer of transformers that reads ids as numbers with spaces between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    ids = {str(i): i for i in range(n_vocab)} | {'[unknown]': n_vocab}  # for what is no id
    words = Tokenizer(models.WordLevel(ids, unk_token='[unknown]'))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)

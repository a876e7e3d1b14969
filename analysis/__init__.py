"""Questions asked of a trained model, one file each, and of one's own in a notebook."""

NAMES = ('induction_heads', 'induction_circuit', 'attention_patterns', 'logit_lens', 'attribution',
         'patching', 'token_loss', 'copying', 'composition', 'ioi', 'subspaces',
         'latent_directions', 'latent_surgery', 'spectrum', 'ablation', 'induction_in_text',
         'development', 'similarity', 'report')


def load(source, device='auto', dtype='float32'):
    """The Subject at source: a checkpoint, an out_dir, the directory of a Hugging Face model, or a
    name such as gpt2. Its weights are float32 or float64. Raises UserError."""
    from analysis.subject import load_subject  # which needs torch
    from runtime.device import pick_float64_device
    return load_subject(source, pick_float64_device(device), dtype=dtype)


def at(name, head=None, position=None):
    """The key of an edit of some heads and positions: see analysis/notebook.py."""
    from analysis import notebook
    return notebook.at(name, head, position)


def to_transformer_lens(subject):
    """A model of TransformerLens that does the same: see analysis/transformer_lens.py."""
    from analysis.transformer_lens import to_transformer_lens as convert
    return convert(subject)

"""Questions asked of a trained model, one file each."""

NAMES = ('induction_heads', 'attention_patterns', 'copying', 'composition', 'ioi', 'subspaces',
         'latent_directions', 'spectrum', 'ablation', 'similarity', 'report')

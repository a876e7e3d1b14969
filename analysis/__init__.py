"""Questions asked of a trained model, one file each."""

NAMES = ('induction_heads', 'induction_circuit', 'attention_patterns', 'copying', 'composition',
         'ioi', 'subspaces', 'latent_directions', 'latent_surgery', 'spectrum', 'ablation',
         'induction_in_text', 'development', 'similarity', 'report')

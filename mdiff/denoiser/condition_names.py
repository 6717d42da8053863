"""Names of the conditions of aMUSEd's U-ViT, as diffusers calls them."""

# A vector of each token (B, S, E), one of the whole (B, P), and numbers on size and crop (B, 5).
STATES, POOLED, MICRO = "encoder_hidden_states", "pooled_text_emb", "micro_conds"

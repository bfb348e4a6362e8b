"""The language-model head in chunks of tokens: hidden states in, log-probs and gradients out."""

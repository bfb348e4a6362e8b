"""The language-model head in chunks of tokens: from hidden states to log-probs and gradients."""

"""Small random models as folders, in the layouts of Hugging Face: checkpoints, tokenizers, drafts."""

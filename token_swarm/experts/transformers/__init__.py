"""The backend on Hugging Face transformers: packed batches over one slot cache."""

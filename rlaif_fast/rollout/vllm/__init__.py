"""Responses drawn by vLLM, in this process or by servers; nothing of vLLM is imported before a sampler is made."""

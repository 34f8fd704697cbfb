"""What runs inside vLLM's workers; vLLM loads it by `worker_extension_cls`."""

from __future__ import annotations

from typing import Any


class WeightUpdates:
    """Methods that vLLM adds to its worker, for `collective_rpc`."""

    def rlaif_fast_load(self: Any, folder: str) -> None:
        """Load the weights of a folder into the running model, whatever the device and the sharding."""
        self.reload_weights(weights_path=folder)
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _pack_heads(self.get_model())


def _pack_heads(model: Any) -> None:
    """A CPU keeps the head packed for its kernels; a tied one is not packed again when its embedding is loaded."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)

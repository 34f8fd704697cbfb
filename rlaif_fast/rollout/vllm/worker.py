"""What runs inside vLLM's workers; vLLM loads it by `worker_extension_cls`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class WeightUpdates:
    """Methods that vLLM adds to its worker, for `collective_rpc`."""

    def rlaif_fast_load(self: Any, folder: str, name: str) -> None:
        """Load the weights of a folder into the running model, whatever the device and the sharding.

        Args:
            folder: Where the weights are.
            name: What `rlaif_fast_describe` calls them from now on.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"{folder} does not exist here; weights_folder must be one that all machines share"
            )
        self.rlaif_fast_weights = None  # until all of them are there
        self.reload_weights(weights_path=folder)
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _pack_heads(self.get_model())
        self.rlaif_fast_weights = name

    def rlaif_fast_describe(self: Any) -> dict[str, Any]:
        """What a client needs to know: model, settings, and which weights were loaded last."""
        settings = self.model_config
        return describe(settings.hf_config) | {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "logprobs_mode": settings.logprobs_mode,
            "mm_device_do_normalize": settings.multimodal_config.mm_device_do_normalize,
            "max_model_len": settings.max_model_len,
            "weights": getattr(self, "rlaif_fast_weights", None),
        }


def describe(config: Any) -> dict[str, Any]:
    """What distinguishes models, by the names in a configuration of transformers."""
    text = config.get_text_config()
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size")
    return {"model_type": config.model_type} | {name: getattr(text, name) for name in sizes}


def _pack_heads(model: Any) -> None:
    """A CPU keeps the head packed for its kernels; a tied one is not packed again when its embedding is loaded."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)

"""The formats by name. Nothing heavy is imported here: a command line shows them."""

FORMATS = {
    "diffusers": "pytorch_lora_weights.safetensors for load_lora_weights, or transformer/ after full training",
    "comfyui": "a LoRA file with the names that ComfyUI looks for",
    "kohya": "a LoRA file of sd-scripts (SD3, FLUX.1) and musubi-tuner (FLUX.2, Qwen-Image, Z-Image)",
    "merged": "a whole pipeline with the change in its weights, for DiffusionPipeline.from_pretrained",
    "hub": "a folder for the hub: the weights as for diffusers, and a model card",
}
"""Format -> what it is."""
FILES = ("comfyui", "kohya")
"""Formats that are one file; the others are folders."""
SUFFIX = ".safetensors"

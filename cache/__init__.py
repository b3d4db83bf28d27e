"""The noise cache: denoising states of earlier pictures, found by the similarity of prompts.

Approximate caching after NIRVANA (Agarwal et al., "Approximate Caching for Efficiently Serving
Text-to-Image Diffusion Models", NSDI 2024), in memory or on Redis behind one protocol,
:class:`engine.ports.NoiseCache`.
"""

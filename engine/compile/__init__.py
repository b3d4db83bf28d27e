"""From a checkpoint to a plan: export to segments, quantize, build, address by digest."""

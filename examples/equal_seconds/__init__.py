"""Experiments that compare settings of direct gradients at equal CPU seconds."""

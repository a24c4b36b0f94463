"""The run folder, the delta it holds, and its model card."""

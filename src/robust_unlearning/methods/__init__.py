"""The unlearning methods: losses, Random Noise Augmentation, and the table of methods."""

"""Words put into questions: forms, places, controls; sets of them on disk, and lm-eval tasks that ask them."""

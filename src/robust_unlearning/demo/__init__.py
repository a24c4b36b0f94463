"""The bundled demo: texts and questions written for it, and the pipeline that shows the effect on a small model."""

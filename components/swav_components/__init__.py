"""TorchX components: the jobs of this project, for any scheduler."""

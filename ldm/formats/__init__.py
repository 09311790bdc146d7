"""The formats that weights and configurations of Stable Diffusion come in; everything ends up under SD's own names."""

"""How the miniature Stable Diffusion of the package was trained, one module a stage."""

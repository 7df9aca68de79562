"""The claims of Jermyn et al., Progress on Attention (2025), one module per topic; every one returns its findings."""

"""DCI (Sec. 3.3): two branches in the early denoising steps, integrated in every cross-attention layer."""

"""The theory: rectified flow, timesteps, guidance, conditioning and samplers. Knows no network."""

"""The HFedMoE experiment: what one run does and the figures that it draws."""

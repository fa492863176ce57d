"""Agents that learn to choose weights: `simplex` and `learner` need nothing but torch, `sac` stable-baselines3."""
